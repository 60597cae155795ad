"""A grammar in xgrammar's EBNF: for a parser to follow where an automaton would be too large.

The same rules whichever way a constraint is kept, so that both accept the same texts; a parser has
no need to bound how deep they nest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_diffusion.constrain.language.syntax import (
    Call,
    Chars,
    Choice,
    Repeat,
    Sequence,
    Text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from vllm_diffusion.constrain.language.syntax import Grammar, Node


def written(grammar: Grammar) -> str:
    """The rules, one a line, the root first and by the name that xgrammar wants.

    What nothing satisfies is left out: xgrammar has no word for it.

    Raises:
        ConstraintError: nothing satisfies the grammar, or a part is half a character.
    """
    possible = _possible(grammar)
    if grammar.root not in possible:
        raise ConstraintError("Nothing satisfies the constraint.")
    names = {rule: f"rule{number}" for number, rule in enumerate(grammar.rules)}
    names = {rule: name for rule, name in names.items() if rule in possible}
    names[grammar.root] = "root"
    ordered = sorted(names, key=lambda rule: rule != grammar.root)
    return "".join(f"{names[rule]} ::= {_node(grammar.rules[rule], names)}\n" for rule in ordered)


def expression(node: Node) -> str:
    """What stands for a node that calls no rules.

    Raises:
        ConstraintError: nothing satisfies it, or a part is half a character.
    """
    if not _has_text(node, ()):
        raise ConstraintError("Nothing satisfies it.")
    return _node(node, {})


def _possible(grammar: Grammar) -> set[str]:
    """The rules that some text follows."""
    possible: set[str] = set()
    while True:
        more = {rule for rule, body in grammar.rules.items() if _has_text(body, possible)}
        if more == possible:
            return possible
        possible = more


def _has_text(node: Node, possible: Collection[str]) -> bool:
    match node:
        case Call(rule):
            return rule in possible
        case Sequence(parts):
            return all(_has_text(part, possible) for part in parts)
        case Choice(options):
            return any(_has_text(option, possible) for option in options)
        case Repeat(part, least, _):
            return least == 0 or _has_text(part, possible)
        case Chars(ranges):
            return bool(ranges)
        case Text():
            return True


def _node(node: Node, names: Mapping[str, str]) -> str:
    """A node that has a text, given the names of the rules that have one."""
    match node:
        case Text(value):
            return _quoted(value)
        case Chars(ranges):
            borders = (f"{_escaped(first)}-{_escaped(last)}" for first, last in ranges)
            return f"[{''.join(borders)}]"
        case Sequence(parts):
            return f"({' '.join(_node(part, names) for part in parts)})" if parts else '""'
        case Choice(options):
            left = [option for option in options if _has_text(option, names)]
            return f"({' | '.join(_node(option, names) for option in left)})"
        case Repeat(part, least, most):
            if not _has_text(part, names):
                return '""'
            return f"({_node(part, names)}){{{least},{'' if most is None else most}}}"
        case Call(rule):
            return names[rule]


def _quoted(value: bytes) -> str:
    try:
        characters = value.decode()
    except UnicodeDecodeError as error:
        raise ConstraintError(f"{value!r} is no text in UTF-8.") from error
    return f'"{"".join(_escaped(ord(each)) for each in characters)}"'


def _escaped(code_point: int) -> str:
    return f"\\U{code_point:08x}"
