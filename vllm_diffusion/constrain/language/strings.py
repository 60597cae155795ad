"""A JSON schema of strings -> what they look like: pattern, format, lengths, and what not to be.

``$also`` of a flat schema is a list of more to obey at once: patterns, formats, and negations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.formats import FORMATS, UNSUPPORTED
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.regular import intersect
from vllm_diffusion.constrain.language.syntax import (
    Call,
    Choice,
    Node,
    Text,
    text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.constrain.language.json_text import Layout


def text_of(schema: Mapping[str, Any], prefix: str, layout: Layout) -> tuple[Node, dict[str, Node]]:
    """What strings of a schema look like, quotes included, and rules that this calls.

    Args:
        schema: flat, of strings.
        prefix: of the names of the rules.
        layout: how strings are written.

    Raises:
        ConstraintError: it cannot be followed; why.
    """
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
    most = None if most is None else int(most)
    wanted, unwanted, names = _asked(schema)
    any_length = not least and most is None
    one = wanted[0] if len(wanted) == 1 and any_length and not unwanted and not names else None
    node = None
    if one is not None:
        node = layout.matching(one)
    elif not wanted and not unwanted and not names:
        node = layout.string(least, most)
    elif not wanted and not unwanted and any_length:
        node = layout.string_except(frozenset(names))
    if node is not None:
        return node, {}
    if names:
        unwanted.append(Choice(tuple(map(text, sorted(names)))))
    wanted += layout.wanted if wanted else layout.free
    try:
        rules = intersect(
            wanted,
            [*unwanted, *layout.unwanted],
            least=least,
            most=most,
            prefix=prefix,
            spelled=layout.spelled,
        )
    except ConstraintError as error:
        if one is not None and (node := layout.narrowed(one)) is not None:
            return node, {}
        keys = [key for key in ("pattern", "format", "minLength", "maxLength") if key in schema]
        if "$also" in schema:
            keys.append("not or allOf")
        raise ConstraintError(f"{' and '.join(map(repr, keys))} together: {error}") from error
    return layout.quoted(Call(next(iter(rules)))), rules


def _asked(schema: Mapping[str, Any]) -> tuple[list[Node], list[Node], set[str]]:
    """Expressions to match, expressions not to match, and texts not to be."""
    wanted: list[Node] = []
    unwanted: list[Node] = []
    names: set[str] = set()
    for part in (schema, *schema.get("$also", ())):
        if "pattern" in part:
            wanted.append(regex(part["pattern"], search=True))
        if "format" in part and (kept := _format(part["format"])):
            wanted.append(regex(kept))
        excluded = part.get("not", {}) if part is not schema else {}
        if "pattern" in excluded:
            unwanted.append(regex(excluded["pattern"], search=True, wide=True))
        names |= {value for value in excluded.get("enum", ()) if isinstance(value, str)}
    return wanted, unwanted, {name for name in names if _spelled(name)}


def _spelled(name: str) -> bool:
    """Whether UTF-8 can spell a text; else no text is it."""
    try:
        return isinstance(text(name), Text)
    except ConstraintError:
        return False


def _format(name: str) -> str | None:
    """The expression of a format; None for one that no standard defines, which says nothing."""
    if name in UNSUPPORTED:
        known = ", ".join(sorted(FORMATS))
        raise ConstraintError(f"has the format {name!r}, not one of {known}")
    return FORMATS.get(name)
