"""JSON schemas of drafts 4 to 7, which clients still send, as draft 2020-12 says the same.

What the newer draft has no meaning for: a list of schemas as ``items``, and exclusive bounds that
are true or false. ``dependencies`` are read where those of today are, see ``negation``.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from vllm_diffusion.constrain.language.addresses import inside


def modern(schema: Any) -> Any:
    """A schema in the words of draft 2020-12; the one given stays as it is.

    Args:
        schema: what its text says, checked by nobody yet.
    """
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    if isinstance(items := result.get("items"), list):
        del result["items"]
        result["prefixItems"] = [*items]
        if "additionalItems" in result:
            result["items"] = result.pop("additionalItems")
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if isinstance(said := result.get(exclusive), bool):
            del result[exclusive]
        if said is True and bound in result:
            result[exclusive] = result.pop(bound)
    for key, at, part, _ in inside(result, "#"):
        if at is None:
            result[key] = modern(part)
        else:
            if result[key] is schema.get(key):
                result[key] = copy(result[key])
            result[key][at] = modern(part)
    return result
