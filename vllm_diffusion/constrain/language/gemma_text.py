"""Numbers and strings of a call in Gemma's form, as far as a schema limits what they may be.

Strings escape nothing, and stand between special tokens that text could spell, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.formats import FORMATS
from vllm_diffusion.constrain.language.numeric import between, bounds
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.syntax import (
    Chars,
    Choice,
    Repeat,
    Sequence,
    Text,
    without,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.constrain.language.syntax import Node


def number(schema: Mapping[str, Any], *, whole: bool) -> Node:
    """Numbers between bounds."""
    step = schema.get("multipleOf")
    if step is not None and not (whole and step == 1):
        raise ConstraintError("'multipleOf' is kept for 1 and integers alone")
    low, high = bounds(schema)
    return between(low, high, whole=whole)


def matching(schema: Mapping[str, Any]) -> Node:
    """The text of a string with a pattern or a format."""
    together = [key for key in ("pattern", "format", "minLength", "maxLength") if key in schema]
    if len(together) > 1:
        raise ConstraintError(f"it has {' and '.join(together)} together")
    if "pattern" in schema:
        return _unmarked(regex(schema["pattern"], search=True))
    if schema["format"] not in FORMATS:
        raise ConstraintError(f"the format {schema['format']!r} is not one of {', '.join(FORMATS)}")
    return _unmarked(regex(FORMATS[schema["format"]]))


def _unmarked(node: Node) -> Node:
    """What a node reads where no "<" may stand, which could begin what ends a string."""
    match node:
        case Chars(ranges):
            return Chars(without(ranges, ((ord("<"), ord("<")),)))
        case Text(value) if b"<" in value:
            raise ConstraintError('the text of a pattern has "<" in it')
        case Sequence(parts):
            return Sequence(tuple(map(_unmarked, parts)))
        case Choice(options):
            return Choice(tuple(map(_unmarked, options)))
        case Repeat(part, least, most):
            return Repeat(_unmarked(part), least, most)
    return node
