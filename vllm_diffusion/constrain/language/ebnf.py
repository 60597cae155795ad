"""EBNF, or Lark, as vLLM's xgrammar backend takes it -> grammar.

xgrammar parses; what it parsed is read from its serialised form, which is exact where its printed
form is for people: a list of expressions, each a number for its kind and its arguments. Lookahead
assertions only speed xgrammar up and are not looked at.
"""

from __future__ import annotations

import json
import re
from typing import Any

from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    Call,
    Chars,
    Choice,
    Grammar,
    Node,
    Repeat,
    Sequence,
    Text,
    complement,
    mark,
    merged,
)
from vllm_diffusion.errors import AutomatonError, ConstraintError

_KINDS = {
    7: "tags inside free text (TagDispatch)",
    10: "all tokens but some, by their ids",
    12: "a regular expression inside a rule",
}

VERSION = "v16"
"""Of the serialised form that is read here."""


def ebnf(grammar: str) -> Grammar:
    """The rules of a grammar in EBNF or Lark; ConstraintError if it does not parse."""
    return _read(parsed(grammar))


def parsed(grammar: str) -> Any:
    """An ``xgrammar.Grammar`` of a text in EBNF or Lark; ConstraintError if it does not parse."""
    from xgrammar import Grammar as Parsed

    read = Parsed.from_ebnf if "::=" in grammar else Parsed.from_lark
    try:
        return read(grammar)
    # What xgrammar raises is as various as what it reads.
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ConstraintError(f"This is not a grammar: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What xgrammar says, without the place in its source that it begins with."""
    return re.sub(r"^\[\S+ \S+\.cc:\d+: ", "", str(error).strip())


def _read(parsed: Any) -> Grammar:
    """A grammar from xgrammar's serialised form."""
    data = json.loads(parsed.serialize_json())
    if data["__VERSION__"] != VERSION:
        raise AutomatonError(
            f"xgrammar writes grammars in the form {data['__VERSION__']}, and {VERSION} is read "
            "here. Install the xgrammar that comes with the vLLM this release was tested with."
        )
    return _Reader(data).grammar(data["root_rule_id"])


class _Reader:
    """Rules by index, expressions by index."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._names = [rule[0] for rule in data["rules"]]
        self._bodies = [rule[1] for rule in data["rules"]]
        self._cells = data["grammar_expr_data"]
        self._first = data["grammar_expr_indptr"]
        self._reached: list[int] = []

    def grammar(self, root: int) -> Grammar:
        """The rules that the root leads to."""
        self._reached = [root]
        rules = {self._names[rule]: self._node(self._bodies[rule]) for rule in self._reached}
        return Grammar(rules, self._names[root])

    def _node(self, index: int) -> Node:
        first = self._first[index]
        kind, length = self._cells[first : first + 2]
        arguments = self._cells[first + 2 : first + 2 + length]
        match kind:
            case 0:
                return Text(bytes(byte & 0xFF for byte in arguments))
            case 1:
                return _characters(arguments)
            case 2:
                return Repeat(_characters(arguments))
            case 3:
                return EMPTY
            case 4:
                return self._called(arguments[0])
            case 5:
                return Sequence(tuple(map(self._node, arguments)))
            case 6:
                return Choice(tuple(map(self._node, arguments)))
            case 8:
                rule, least, most = arguments[:3]
                return Repeat(self._called(rule), least, None if most < 0 else most)
            case 9:
                return Choice(tuple(Text(mark(token)) for token in arguments))
        what = _KINDS.get(kind, f"an expression of kind {kind}")
        raise AutomatonError(f"The grammar uses {what}, which no automaton is built for.")

    def _called(self, rule: int) -> Call:
        if rule not in self._reached:
            self._reached.append(rule)
        return Call(self._names[rule])


def _characters(arguments: list[int]) -> Chars:
    negated, *borders = arguments
    ranges = list(zip(borders[::2], borders[1::2], strict=True))
    return Chars(complement(ranges) if negated else merged(ranges))
