"""A grammar in xgrammar's EBNF: for a parser to follow where an automaton would be too large.

The same rules whichever way a constraint is kept, so that both accept the same texts; a parser has
no need to bound how deep they nest.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

from vllm_diffusion.constrain.language.literals import acyclic, told_apart
from vllm_diffusion.constrain.language.room import lengths
from vllm_diffusion.constrain.language.syntax import (
    MARK,
    Call,
    Chars,
    Choice,
    Repeat,
    Sequence,
    Text,
    mark,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from vllm_diffusion.constrain.language.syntax import Grammar, Node


MOST_TIMES = (1 << 31) - 1
"""As often as xgrammar can count; no text has a part more often."""

_ID_BYTES = len(mark(0)) - len(MARK)

_MANY_TEXTS = 64
"""Of a choice that is written by rules for what its texts share."""


def written(grammar: Grammar) -> str:
    """The rules, one a line, the root first and by the name that xgrammar wants.

    What nothing satisfies is left out: xgrammar has no word for it.

    Raises:
        ConstraintError: nothing satisfies the grammar, or a part is half a character.
    """
    possible = _possible(grammar)
    if grammar.root not in possible:
        raise ConstraintError("Nothing satisfies the constraint.")
    writer = _Writer({rule: f"rule{number}" for number, rule in enumerate(grammar.rules)}, possible)
    writer.names[grammar.root] = "root"
    ordered = sorted(writer.names, key=lambda rule: rule != grammar.root)
    lines = [f"{writer.names[rule]} ::= {writer.node(grammar.rules[rule])}\n" for rule in ordered]
    return "".join([*lines, *writer.lines])


def _possible(grammar: Grammar) -> set[str]:
    """The rules that some text follows."""
    return {rule for rule, length in lengths(grammar).items() if length < inf}


def _has_text(node: Node, possible: Collection[str]) -> bool:
    match node:
        case Call(rule):
            return rule in possible
        case Sequence(parts):
            return all(_has_text(part, possible) for part in parts)
        case Choice(options):
            return any(_has_text(option, possible) for option in options)
        case Repeat(part, least, most):
            possible_times = most is None or least <= most
            return possible_times and (least == 0 or _has_text(part, possible))
        case Chars(ranges):
            return bool(ranges)
        case Text():
            return True


class _Writer:
    """Writes nodes that have a text.

    Args:
        names: of the rules of the grammar, as they are written.
        possible: the rules that have a text; others are left out.
    """

    def __init__(self, names: Mapping[str, str], possible: set[str]) -> None:
        self.names = {rule: name for rule, name in names.items() if rule in possible}
        self.lines: list[str] = []
        """Rules that the grammar does not have."""

    def node(self, node: Node) -> str:
        """What stands for a node."""
        match node:
            case Text(value):
                return _quoted(value)
            case Chars(ranges):
                borders = (f"{_escaped(first)}-{_escaped(last)}" for first, last in ranges)
                return f"[{''.join(borders)}]"
            case Sequence(parts):
                return f"({' '.join(map(self.node, parts))})" if parts else '""'
            case Choice():
                return self._choice(node)
            case Repeat(part, least, most):
                if not _has_text(part, self.names):
                    return '""'
                if least > MOST_TIMES:
                    raise ConstraintError(f"A part is asked for {least} times: no text is so long.")
                last = "" if most is None or most > MOST_TIMES else most
                return f"({self.node(part)}){{{least},{last}}}"
            case Call(rule):
                return self.names[rule]

    def _choice(self, node: Choice) -> str:
        texts, left = told_apart(node)
        if len(texts) < _MANY_TEXTS or any(MARK in each for each in texts):
            texts, left = [], list(node.options)
        options = [self.node(option) for option in left if _has_text(option, self.names)]
        if texts:
            options.append(self._listed(texts))
        return f"({' | '.join(options)})"

    def _listed(self, texts: list[bytes]) -> str:
        """Many fixed texts, by rules for what they share at both ends.

        xgrammar's own way with ``value 1 | value 2 | ...`` is slow: 41 s for 20 000 of them at
        262144 tokens, and 0.01 s for these rules.
        """
        states = acyclic([*map(ord, text.decode())] for text in texts)
        number = len(self.lines)
        pending = [len(states) - 1]
        seen = {*pending}
        for state in pending:
            edges, final = states[state]
            options = ['""'] * final
            for first, behind in edges:
                read, to = _escaped(first), behind
                while len(states[to][0]) == 1 and not states[to][1]:
                    [(only, to)] = states[to][0]
                    read += _escaped(only)
                more = f" list{number}_{to}" if states[to][0] else ""
                options.append(f'"{read}"{more}')
                if more and to not in seen:
                    pending.append(to)
                    seen.add(to)
            self.lines.append(f"list{number}_{state} ::= {' | '.join(options)}\n")
        return f"list{number}_{pending[0]}"


def _quoted(value: bytes) -> str:
    if MARK in value:
        head, _, rest = value.partition(MARK)
        token = f"Token({int.from_bytes(rest[:_ID_BYTES], 'big')})"
        sides = [_quoted(side) for side in (head, rest[_ID_BYTES:]) if side]
        return f"({' '.join([*sides[: bool(head)], token, *sides[bool(head) :]])})"
    try:
        characters = value.decode()
    except UnicodeDecodeError as error:
        raise ConstraintError(f"{value!r} is no text in UTF-8.") from error
    return f'"{"".join(_escaped(ord(each)) for each in characters)}"'


def _escaped(code_point: int) -> str:
    return f"\\U{code_point:08x}"
