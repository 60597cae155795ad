"""A constraint as a grammar: rules over characters, whatever it was written in.

Regular expressions, JSON schemas and EBNF are translated into these nodes; ``network`` compiles
them. Characters are Unicode code points; how UTF-8 spells them is decided later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

Ranges = tuple[tuple[int, int], ...]
"""Code points, first and last of each range, ascending and apart."""

LAST_CODE_POINT = 0x10FFFF

MARK = b"\xff"
"""What begins the mark of a special token: a byte that no character of UTF-8 has."""


@dataclass(frozen=True, slots=True)
class Text:
    """These bytes."""

    value: bytes


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of a set; surrogates, which UTF-8 cannot spell, do not count."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Sequence:
    """One part after the other; no part: the empty text."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the options; no option: nothing, not even the empty text."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """A part, ``least`` to ``most`` times; None: any number of times."""

    part: Node
    least: int = 0
    most: int | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """What a rule says."""

    rule: str


Node = Text | Chars | Sequence | Choice | Repeat | Call

EMPTY = Sequence(())
NOTHING = Choice(())


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules by name, and the one that a whole text must follow."""

    rules: Mapping[str, Node]
    root: str


def mark(token: int) -> bytes:
    """What stands for a special token in texts: bytes that no character of UTF-8 has."""
    return MARK + token.to_bytes(3, "big")


def text(value: str) -> Text:
    """These characters; ConstraintError if UTF-8 cannot spell them."""
    try:
        return Text(value.encode())
    except UnicodeEncodeError as error:
        raise ConstraintError(f"{value!r} has half of a surrogate pair in it.") from error


def sequence(*parts: Node) -> Sequence:
    """One part after the other."""
    return Sequence(parts)


def choice(*options: Node) -> Choice:
    """One of the options."""
    return Choice(options)


def optional(part: Node) -> Repeat:
    """A part or nothing."""
    return Repeat(part, 0, 1)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same code points, ascending and apart."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return tuple(result)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Every other code point."""
    result, position = [], 0
    for first, last in merged(ranges):
        if position < first:
            result.append((position, first - 1))
        position = last + 1
    if position <= LAST_CODE_POINT:
        result.append((position, LAST_CODE_POINT))
    return tuple(result)


def without(ranges: Iterable[tuple[int, int]], others: Iterable[tuple[int, int]]) -> Ranges:
    """The code points of ``ranges`` that are not in ``others``."""
    return complement((*complement(ranges), *others))


def renamed(grammar: Grammar, prefix: str, *, kept: Collection[str] = ()) -> Grammar:
    """The same, the name of every rule but those ``kept`` behind ``prefix``."""

    def named(rule: str) -> str:
        return rule if rule in kept else prefix + rule

    def node(old: Node) -> Node:
        match old:
            case Call(rule):
                return Call(named(rule))
            case Sequence(parts):
                return Sequence(tuple(map(node, parts)))
            case Choice(options):
                return Choice(tuple(map(node, options)))
            case Repeat(part, least, most):
                return Repeat(node(part), least, most)
        return old

    rules = {named(name): node(body) for name, body in grammar.rules.items()}
    return Grammar(rules, named(grammar.root))


def without_left_recursion(rules: Mapping[str, Node]) -> dict[str, Node]:
    """The same language, with every rule that begins with itself written as a loop.

    ``a ::= a x | b`` becomes ``a ::= b x*``. A rule that begins with itself through another rule
    stays as it is.
    """
    return {name: _looped(name, body) for name, body in rules.items()}


def _looped(name: str, body: Node) -> Node:
    heads: list[Node] = []
    tails: list[Node] = []
    for option in _options(body):
        parts = tuple(_parts(option))
        if parts and parts[0] == Call(name):
            tails.append(Sequence(parts[1:]))
        else:
            heads.append(option)
    if not tails:
        return body
    return sequence(Choice(tuple(heads)), Repeat(Choice(tuple(tails))))


def _options(node: Node) -> Iterable[Node]:
    if isinstance(node, Choice):
        for option in node.options:
            yield from _options(option)
    elif isinstance(node, Sequence) and len(node.parts) == 1:
        yield from _options(node.parts[0])
    else:
        yield node


def _parts(node: Node) -> Iterable[Node]:
    if isinstance(node, Sequence):
        for part in node.parts:
            yield from _parts(part)
    elif isinstance(node, Choice) and len(node.options) == 1:
        yield from _parts(node.options[0])
    else:
        yield node
