"""What to ask instead where a schema cannot be followed: less and less of it.

For tools that are not strict: a client would rather have a call that its schema may not allow than
none. What is dropped is dropped where it stands; everything around it is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.compose import OF_TYPE, asserted

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHAPE = ("type", "properties", "required", "items")
_SIMPLE = {
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems"),
    *("enum", "const", "anyOf", "allOf", "$ref", "minItems", "maxItems", "minLength", "maxLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def looser(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema, then ones that ask for less, anything at last."""
    yield schema
    schema = asserted(schema)
    if "type" not in schema:
        implied = [kind for kind, keywords in OF_TYPE.items() if keywords & schema.keys()]
        schema |= {"type": implied} if implied else {}
    simple = {key: value for key, value in schema.items() if key in _SIMPLE}
    if "anyOf" not in simple and "oneOf" in schema:
        simple["anyOf"] = schema["oneOf"]
    yield simple
    yield {key: schema[key] for key in _SHAPE if key in schema}
    yield {key: schema[key] for key in ("type",) if key in schema}
    yield {}
