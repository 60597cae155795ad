"""How Gemma 4 writes the arguments of a call: the layout that their schemas are translated by.

    {city:<|"|>Paris<|"|>,days:3,tags:[<|"|>a<|"|>]}

No white space, names bare and in alphabetical order, as the chat template writes them. A string
stands between two special tokens and escapes nothing, so ``<|``, which begins how these are
spelled, is in no string.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.json_text import Layout
from vllm_diffusion.constrain.language.regex import ANYTHING, regex
from vllm_diffusion.constrain.language.syntax import (
    Chars,
    Choice,
    Node,
    Repeat,
    Sequence,
    Text,
    choice,
    complement,
    mark,
    optional,
    sequence,
    text,
    without,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_LESS = ((ord("<"), ord("<")),)
_BAR = ((ord("|"), ord("|")),)
_LESS_OR_BAR = (*_LESS, *_BAR)
_NO_LESS = Chars(complement(_LESS))
_NO_MARK = choice(_NO_LESS, sequence(Repeat(text("<"), 1), Chars(complement(_LESS_OR_BAR))))
"""A part of a string, one character or several, that ``<|`` cannot be made of."""

_LONG = 4096
"""From so many characters on a bound is counted in parts of up to three, a third as many."""

_BARS = Repeat(text("|"), 0, 2)
_NO_BAR = Chars(complement(_BAR))
_THREE = choice(_NO_BAR, sequence(Chars(complement(_LESS_OR_BAR)), Repeat(text("|"), 1, 2)))

_DIGIT = Chars(((0x30, 0x39),))
_NUMBER = sequence(
    optional(text("-")),
    choice(text("0"), sequence(Chars(((0x31, 0x39),)), Repeat(_DIGIT))),
    optional(sequence(text("."), Repeat(_DIGIT, 1))),
    # Three digits would reach what is no double, and vLLM's parser takes for a text.
    optional(
        sequence(
            Chars(((0x45, 0x45), (0x65, 0x65))),
            optional(Chars(((0x2B, 0x2B), (0x2D, 0x2D)))),
            Repeat(_DIGIT, 1, 2),
        )
    ),
)

_UNNAMED = set(':{}[]"<>|')
"""What a name cannot have in it: vLLM's parser reads it up to a colon, and counts brackets."""

_BLANKS = (
    *((0x00, 0x20), (0x7F, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)),
    *((0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
_WORD = Repeat(Chars(complement((*_BLANKS, *((ord(each), ord(each)) for each in ',:{}[]"<>|')))), 1)
_ANY_NAME = sequence(_WORD, Repeat(sequence(Repeat(text(" "), 1), _WORD)))
_NAME = regex(r"[a-zA-Z_][a-zA-Z0-9_.-]*")


class CallLayout(Layout):
    """Arguments of calls.

    Args:
        quote: id of the special token at both ends of a string.
    """

    number = _NUMBER
    unwanted: tuple[Node, ...] = (sequence(ANYTHING, text("<|"), ANYTHING),)

    def __init__(self, quote: int) -> None:
        super().__init__(any_whitespace=False)
        self._id = quote
        self._quote = Text(mark(quote))

    def at(self, depth: int | None) -> CallLayout:
        """The same at every depth."""
        del depth
        return self

    def naming(self) -> Layout:
        """For the names of members."""
        return _Names(self._id)

    def name(self, name: str) -> Node:
        """A name of a member; ConstraintError where vLLM's parser would not read it as one."""
        if set(name) & _UNNAMED or name != name.strip().lstrip(","):
            raise ConstraintError(f"a call cannot name a parameter {name!r}")
        return text(name)

    def ordered(self, members: Mapping[str, Any]) -> dict[str, Any]:
        """Members as the chat template sorts them."""
        return dict(sorted(members.items(), key=lambda member: member[0].lower()))

    def quoted(self, content: Node) -> Node:
        """A string of this content."""
        return sequence(self._quote, content, self._quote)

    def spelled(self, node: Node) -> Node:
        """Nothing is escaped."""
        return node

    def string(self, least: int, most: int | None) -> Node | None:
        """Any string of so many characters.

        What ``<|`` cannot be made of, one character at a time, has no ``<``. Where the bound is
        so large that a third of it is enough, ``<|`` and ``|||`` alone are left out.
        """
        if not least and most is None:
            return self.quoted(sequence(Repeat(_NO_MARK), Repeat(text("<"))))
        if most is None:
            return self.quoted(Repeat(_NO_MARK, least))
        if most < _LONG:
            return self.quoted(Repeat(_NO_LESS, least, most))
        parts = sequence(_BARS, Repeat(_THREE, least, most // 3 - 1))
        return self.quoted(choice(Repeat(_NO_BAR, least, most), parts))

    def string_except(self, names: frozenset[str]) -> Node | None:
        """Left to an automaton."""
        del names
        return None

    def matching(self, node: Node) -> Node | None:
        """A string whose text a node reads, where that has no ``<``."""
        return None if _has_less(node) else self.quoted(node)

    def narrowed(self, node: Node) -> Node | None:
        """The same without ``<``; None where a fixed part has it."""
        less = _without_less(node)
        return less and self.quoted(less)

    def value(self, value: Any) -> Node:
        """Exactly this value."""
        return self.quoted(text(value)) if isinstance(value, str) else super().value(value)

    def values(self, values: Iterable[Any]) -> Node:
        """One of some values; the quotes stand once around all texts among them."""
        values = list(values)
        others = [self.value(value) for value in values if not isinstance(value, str)]
        texts = [text(value) for value in values if isinstance(value, str)]
        return choice(*others, *([self.quoted(Choice(tuple(texts)))] if texts else []))


class _Names(CallLayout):
    """Names of members, which are strings without quotes and with less in them."""

    free = (_NAME,)
    wanted = (_ANY_NAME,)
    unwanted = ()

    def quoted(self, content: Node) -> Node:
        """Names have no quotes."""
        return content

    def string(self, least: int, most: int | None) -> Node | None:
        """A plain name."""
        return None if least > 1 or most is not None else _NAME

    def matching(self, node: Node) -> Node | None:
        """Left to an automaton."""
        del node
        return None

    narrowed = matching

    def values(self, values: Iterable[Any]) -> Node:
        """One of some names; those that cannot be written are left out."""
        names: list[Node] = []
        for value in values:
            with suppress(ConstraintError):
                names.append(self.name(value))
        return Choice(tuple(names))


def _has_less(node: Node) -> bool:
    match node:
        case Chars(ranges):
            return without(ranges, _LESS) != ranges
        case Text(value):
            return b"<" in value
        case Sequence(parts) | Choice(parts):
            return any(map(_has_less, parts))
        case Repeat(part, _, _):
            return _has_less(part)
    return False


def _without_less(node: Node) -> Node | None:
    match node:
        case Chars(ranges):
            return Chars(without(ranges, _LESS))
        case Text(value):
            return None if b"<" in value else node
        case Sequence(parts):
            several = [_without_less(part) for part in parts]
            return None if None in several else Sequence(tuple(filter(None, several)))
        case Choice(options):
            return Choice(tuple(filter(None, map(_without_less, options))))
        case Repeat(part, least, most):
            less = _without_less(part)
            return less and Repeat(less, least, most)
    return node
