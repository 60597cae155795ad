"""A JSON schema of strings -> what they look like: pattern, format, lengths, and what not to be.

``$also`` of a flat schema is a list of more to obey at once: patterns, formats, and negations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language import json_text as write
from vllm_diffusion.constrain.language.formats import FORMATS, UNSUPPORTED
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.regular import together
from vllm_diffusion.constrain.language.syntax import (
    Call,
    Choice,
    Node,
    Repeat,
    Text,
    sequence,
    text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping


def text_of(schema: Mapping[str, Any], prefix: str) -> tuple[Node, dict[str, Node]]:
    """What strings of a schema look like, quotes included, and rules that this calls.

    Args:
        schema: flat, of strings.
        prefix: of the names of the rules.

    Raises:
        ConstraintError: it cannot be followed; why.
    """
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
    most = None if most is None else int(most)
    wanted, unwanted, names = _asked(schema)
    if not unwanted and not wanted and not least and most is None:
        return write.string_except(frozenset(names)), {}
    if not unwanted and not names:
        if not wanted:
            times = Repeat(write.CHARACTER, least, most)
            return sequence(write.QUOTE, times, write.QUOTE), {}
        if len(wanted) == 1 and not least and most is None:
            return write.string(wanted[0]), {}
    if names:
        unwanted.append(Choice(tuple(map(text, sorted(names)))))
    try:
        rules = together(
            wanted, unwanted, least=least, most=most, prefix=prefix, spelled=write.spelled
        )
    except ConstraintError as error:
        keys = [key for key in ("pattern", "format", "minLength", "maxLength") if key in schema]
        if "$also" in schema:
            keys.append("not or allOf")
        raise ConstraintError(f"{' and '.join(map(repr, keys))} together: {error}") from error
    return sequence(write.QUOTE, Call(next(iter(rules))), write.QUOTE), rules


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
