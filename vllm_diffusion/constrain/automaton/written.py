"""A grammar in xgrammar's EBNF: for a parser to follow where an automaton would be too large.

The same rules whichever way a constraint is kept, so that both accept the same texts; a parser has
no need to bound how deep they nest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_diffusion.constrain.automaton.syntax import (
    Call,
    Chars,
    Choice,
    Repeat,
    Sequence,
    Text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.syntax import Grammar, Node


def written(grammar: Grammar) -> str:
    """The rules, one a line, the root first and by the name that xgrammar wants.

    Raises:
        ConstraintError: nothing satisfies some part of it, or a part is half a character.
    """
    names = {rule: f"rule{number}" for number, rule in enumerate(grammar.rules)}
    names[grammar.root] = "root"
    ordered = sorted(grammar.rules, key=lambda rule: rule != grammar.root)
    return "".join(f"{names[rule]} ::= {_node(grammar.rules[rule], names)}\n" for rule in ordered)


def _node(node: Node, names: dict[str, str]) -> str:
    match node:
        case Text(value):
            return _quoted(value)
        case Chars(ranges):
            borders = (f"{_escaped(first)}-{_escaped(last)}" for first, last in ranges)
            return f"[{''.join(borders)}]"
        case Sequence(parts):
            return f"({' '.join(_node(part, names) for part in parts)})" if parts else '""'
        case Choice(options):
            if not options:
                raise ConstraintError("Nothing satisfies a part of the constraint.")
            return f"({' | '.join(_node(option, names) for option in options)})"
        case Repeat(part, least, most):
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
