"""A constraint as its request gives it, a kind and a text -> grammar."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from vllm_diffusion.constrain.language.ebnf import ebnf
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.schema import json_schema
from vllm_diffusion.constrain.language.syntax import Choice, Grammar, text
from vllm_diffusion.constrain.language.tags import structural_tag
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


def grammar_of(
    kind: str,
    source: str,
    *,
    any_whitespace: bool = True,
    whitespace_pattern: str | None = None,
    tool_form: str | None = None,
) -> Grammar:
    """The rules of a constraint.

    Args:
        kind: one of ``KINDS``.
        source: the JSON schema, the regular expression, the JSON list of choices, the grammar in
            EBNF or Lark, the structural tag; nothing for ``json_object``.
        any_whitespace: between the parts of JSON values as pretty printers write; else none.
        whitespace_pattern: a regular expression for that white space, instead.
        tool_form: for structural tags of tool calls, see ``tags.structural_tag``.

    Raises:
        ConstraintError: it is malformed, not supported, or nested too deep to be read.
        AutomatonError: it makes sense, but says what no automaton is built for.
    """
    json_of = partial(
        json_schema, any_whitespace=any_whitespace, whitespace_pattern=whitespace_pattern
    )
    try:
        return _read(kind, source, json_of, tool_form)
    except RecursionError:
        raise ConstraintError("The constraint is nested too deep.") from None


def _read(
    kind: str, source: str, json_of: Callable[[str], Grammar], tool_form: str | None
) -> Grammar:
    match kind:
        case "json":
            return json_of(source)
        case "json_object":
            return json_of('{"type": "object"}')
        case "regex":
            return Grammar({"regex": regex(source)}, "regex")
        case "choice":
            return Grammar({"choice": Choice(tuple(map(text, _choices(source))))}, "choice")
        case "grammar":
            return ebnf(source)
        case "structural_tag":
            return structural_tag(source, json_of, tool_form=tool_form)
    raise ConstraintError(f"A constraint is one of {', '.join(KINDS)}, not {kind!r}.")


def _choices(source: str) -> list[str]:
    try:
        choices = json.loads(source)
    except ValueError:
        choices = None
    if not isinstance(choices, list) or not all(isinstance(each, str) for each in choices):
        raise ConstraintError(f"The choices must be a JSON list of strings, not {source!r}.")
    if not choices:
        raise ConstraintError("Nothing satisfies these choices: they cannot be an empty list.")
    return choices
