r"""How JSON values are written: syntax nodes for strings, numbers, names, and any value.

``Layout`` is what a schema is translated by; calls in another form have another one.

A string has one spelling, that of ``json.dumps(ensure_ascii=False)``: an escape stands only where
JSON demands one. Otherwise "\u0061" could pass for a name other than "a", and lengths and
patterns would have to see through escapes. Every string can still be written.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    NOTHING,
    Call,
    Chars,
    Choice,
    Node,
    Ranges,
    Repeat,
    Sequence,
    Text,
    choice,
    complement,
    optional,
    sequence,
    text,
    without,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_ESCAPED: Ranges = ((0x00, 0x1F), (0x22, 0x22), (0x5C, 0x5C))

_DIGIT = Chars(((0x30, 0x39),))
_DIGITS = Repeat(_DIGIT, 1)
_MINUS = optional(text("-"))
_WHOLE = choice(text("0"), sequence(Chars(((0x31, 0x39),)), Repeat(_DIGIT)))

INTEGER = choice(text("0"), sequence(_MINUS, Chars(((0x31, 0x39),)), Repeat(_DIGIT)))
NUMBER = sequence(
    _MINUS,
    _WHOLE,
    optional(sequence(text("."), _DIGITS)),
    optional(
        sequence(
            Chars(((0x45, 0x45), (0x65, 0x65))),
            optional(Chars(((0x2B, 0x2B), (0x2D, 0x2D)))),
            _DIGITS,
        )
    ),
)
BOOLEAN = choice(text("true"), text("false"))
NULL = text("null")
QUOTE = text('"')


def literal(value: Any) -> Node:
    """Exactly this string, number, boolean or null, as ``json.dumps`` writes it."""
    try:
        return text(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError as error:  # not a number
        raise ConstraintError(f"The value {value!r} cannot be written: {error}.") from error


@cache
def characters(ranges: Ranges) -> Node:
    """One character of these, as it is written inside a string."""
    escapes = [
        text(json.dumps(chr(point))[1:-1])
        for first, last in _ESCAPED
        for point in range(first, last + 1)
        if any(low <= point <= high for low, high in ranges)
    ]
    return choice(Chars(without(ranges, _ESCAPED)), *escapes)


def spelled(node: Node) -> Node:
    """What a node over plain characters reads, as it is written inside a string."""
    match node:
        case Text(value):
            return text(json.dumps(value.decode(), ensure_ascii=False)[1:-1])
        case Chars(ranges):
            return characters(ranges)
        case Sequence(parts):
            return Sequence(tuple(map(spelled, parts)))
        case Choice(options):
            return Choice(tuple(map(spelled, options)))
        case Repeat(part, least, most):
            return Repeat(spelled(part), least, most)
        case Call(_):
            raise AssertionError("patterns call no rules")


CHARACTER = characters(complement(()))


def _other_than(names: frozenset[str]) -> Node:
    """Written characters that do not spell one of ``names``, decided character by character."""
    if not names:
        return Repeat(CHARACTER)
    heads = sorted({name[0] for name in names if name})
    points = tuple((ord(head), ord(head)) for head in heads)
    options = [sequence(characters(complement(points)), Repeat(CHARACTER))]
    for head in heads:
        tails = frozenset(name[1:] for name in names if name.startswith(head))
        options.append(sequence(characters(((ord(head), ord(head)),)), _other_than(tails)))
    return Choice(tuple(options)) if "" in names else optional(Choice(tuple(options)))


_BLANKS: Ranges = ((0x09, 0x0A), (0x0D, 0x0D), (0x20, 0x20))
_UNKNOWN_DEPTH = 2
"""Taken for the depth of what may stand at several."""


class Layout:
    """How a value that nests ``depth`` deep is written, and where white space stands in it.

    Without a pattern: what pretty printers write. One blank behind a colon, a comma or a bracket,
    or behind the last two a line break and an indentation of at most four blanks or a tab a level.
    No more than that: a writer who may always add a blank does so until the room is used up.

    Args:
        any_whitespace: as above; else none at all.
        pattern: a regular expression for what may stand at all places where JSON lets white space
            stand, instead; what it matches that is no white space does not count.
        depth: arrays and objects around the value; None: it may stand at several depths.
    """

    number: Node = NUMBER
    free: tuple[Node, ...] = ()
    """What every string is that has no pattern."""
    wanted: tuple[Node, ...] = ()
    """What every string with a pattern is as well."""
    unwanted: tuple[Node, ...] = ()
    """What no string is."""

    def __init__(
        self, *, any_whitespace: bool = True, pattern: str | None = None, depth: int | None = 0
    ) -> None:
        self.depth = depth
        self._any_whitespace, self._pattern = any_whitespace, pattern
        self._before: Node = EMPTY  # a colon or a comma
        self._colon: Node = EMPTY  # behind one
        self.line: Node = EMPTY
        """What may stand behind a comma, and inside brackets."""
        if any_whitespace and pattern is not None:
            self._before = self._colon = self.line = _blanks(regex(pattern))
        elif any_whitespace:
            self._colon = optional(text(" "))
            levels = _UNKNOWN_DEPTH if depth is None else depth
            blanks = Repeat(text("  "), 0, 2 * levels)
            tabs = Repeat(text("\t"), 1, depth) if depth else NOTHING
            indented = sequence(text("\n"), choice(blanks, tabs))
            self.line = optional(choice(text(" "), indented))

    def at(self, depth: int | None) -> Layout:
        """The same at another depth."""
        return Layout(any_whitespace=self._any_whitespace, pattern=self._pattern, depth=depth)

    def deeper(self) -> Layout:
        """For what stands in an array or an object here."""
        return self.at(None if self.depth is None else self.depth + 1)

    def naming(self) -> Layout:
        """For the names of members."""
        return self

    def name(self, name: str) -> Node:
        """A name of a member; ConstraintError where it cannot be written."""
        return literal(name)

    def ordered(self, members: Mapping[str, Any]) -> dict[str, Any]:
        """Members in the order in which they are written."""
        return dict(members)

    def quoted(self, content: Node) -> Node:
        """A string of this content."""
        return sequence(QUOTE, content, QUOTE)

    def spelled(self, node: Node) -> Node:
        """What a node over plain characters reads, as it is written inside a string."""
        return spelled(node)

    def string(self, least: int, most: int | None) -> Node | None:
        """Any string of so many characters; None: only an automaton of its own can say."""
        return self.quoted(Repeat(CHARACTER, least, most))

    def string_except(self, names: frozenset[str]) -> Node | None:
        """Any string but these; None: as above."""
        return self.quoted(_other_than(names))

    def matching(self, node: Node) -> Node | None:
        """A string whose text a node reads; None: as above."""
        return self.quoted(self.spelled(node))

    def narrowed(self, node: Node) -> Node | None:
        """Some of the same where that automaton is too large; None: there is no such thing."""
        return self.matching(node)

    def member(self, name: Node, value: Node) -> Node:
        """Name, colon and value."""
        return sequence(name, self._before, text(":"), self._colon, value)

    def behind_comma(self, part: Node) -> Node:
        """A part that follows another one."""
        return sequence(self._before, text(","), self.line, part)

    def enclosed(self, kind: str, content: Node) -> Node:
        """An object or an array of this content, laid out one level deeper."""
        return self.braces(content) if kind == "object" else self.brackets(content)

    def braces(self, members: Node) -> Node:
        """An object of these members, laid out one level deeper; none: an empty one."""
        return sequence(text("{"), self.deeper().line, members, self.line, text("}"))

    def brackets(self, items: Node) -> Node:
        """An array of these items, laid out one level deeper."""
        return sequence(text("["), self.deeper().line, items, self.line, text("]"))

    def value(self, value: Any) -> Node:
        """Exactly this value, its members in this order."""
        inner = self.deeper()
        match value:
            case dict():
                members = self.ordered(value).items()
                parts = [
                    inner.member(inner.name(name), inner.value(each)) for name, each in members
                ]
                return self.braces(inner.series(parts))
            case list():
                return self.brackets(inner.series(list(map(inner.value, value))))
        return literal(value)

    def values(self, values: Iterable[Any]) -> Node:
        """One of some values."""
        return Choice(tuple(map(self.value, values)))

    def series(self, parts: list[Node]) -> Node:
        """Parts with commas between."""
        return sequence(*parts[:1], *map(self.behind_comma, parts[1:]))

    def listed(self, part: Node, least: int = 0, most: int | None = None) -> Node:
        """A part, ``least`` to ``most`` times, commas between."""
        if most == 0:
            return Sequence(()) if least == 0 else NOTHING
        more = Repeat(
            self.behind_comma(part), max(least - 1, 0), None if most is None else most - 1
        )
        several = sequence(part, more)
        return several if least else optional(several)

    def any_string(self) -> Node:
        """Any string at all."""
        node = self.string(0, None)
        assert node is not None
        return node

    def any_rules(self, value: str, array: str, object_: str) -> dict[str, Node]:
        """Rules, by the names given, of any value, any array and any object."""
        several = self.at(None)
        return {
            value: choice(
                self.any_string(), self.number, BOOLEAN, NULL, Call(array), Call(object_)
            ),
            array: several.brackets(several.listed(Call(value))),
            object_: several.braces(
                several.listed(several.member(self.naming().any_string(), Call(value)))
            ),
        }


def _blanks(node: Node) -> Node:
    """What a node reads of white space."""
    match node:
        case Chars(ranges):
            return Chars(without(_BLANKS, complement(ranges)))
        case Sequence(parts):
            return Sequence(tuple(map(_blanks, parts)))
        case Choice(options):
            return Choice(tuple(map(_blanks, options)))
        case Repeat(part, least, most):
            return Repeat(_blanks(part), least, most)
    return node
