r"""Regular expressions in Python's dialect -> syntax nodes.

Python's own parser reads them, so what is accepted is what ``re`` accepts, with two exceptions,
both on the safe side where dialects differ: \d, \w and \s mean ASCII, and their opposites
everything that no dialect counts among them. ``.`` is anything but a newline.
"""

from __future__ import annotations

import re
import re._constants as sre  # what Python's parser gives; hypothesis reads it the same way
import re._parser as parser
from functools import cache
from typing import Any

from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    LAST_CODE_POINT,
    Chars,
    Choice,
    Node,
    Ranges,
    Repeat,
    Sequence,
    complement,
    merged,
    optional,
    sequence,
)
from vllm_diffusion.errors import ConstraintError

ANYTHING = Repeat(Chars(((0, LAST_CODE_POINT),)))

# Letter of a category -> what every dialect counts in.
_ASCII: dict[str, Ranges] = {
    "d": ((0x30, 0x39),),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
}
_CATEGORY = {
    sre.CATEGORY_DIGIT: ("d", True),
    sre.CATEGORY_SPACE: ("s", True),
    sre.CATEGORY_WORD: ("w", True),
    sre.CATEGORY_NOT_DIGIT: ("d", False),
    sre.CATEGORY_NOT_SPACE: ("s", False),
    sre.CATEGORY_NOT_WORD: ("w", False),
}
_REFUSED = {
    sre.ASSERT: "lookaround (?=...)",
    sre.ASSERT_NOT: "lookaround (?!...)",
    sre.GROUPREF: "a reference to a group",
    sre.GROUPREF_EXISTS: "a conditional group (?(1)...)",
    sre.ATOMIC_GROUP: "an atomic group (?>...)",
    sre.POSSESSIVE_REPEAT: "a possessive repeat such as a*+",
    sre.AT: "an anchor inside the expression (^, $, \\b, \\A, \\Z)",
}
_BEGINNING = {sre.AT_BEGINNING, sre.AT_BEGINNING_STRING}
_END = {sre.AT_END, sre.AT_END_STRING}


def regex(expression: str, *, search: bool = False, wide: bool = False) -> Node:
    """What a regular expression matches.

    Args:
        expression: in the dialect of Python's ``re``.
        search: a match anywhere will do, as in a JSON schema's ``pattern``, unless anchors say
            otherwise; else the whole text must match.
        wide: what any dialect matches, for what must not match; else what all of them do.

    Raises:
        ConstraintError: it does not parse, or uses what no automaton can follow.
    """
    try:
        parsed = parser.parse(expression)
    except (re.error, OverflowError) as error:
        raise ConstraintError(f"{expression!r} is not a regular expression: {error}.") from error
    flags = parsed.state.flags
    if flags & (re.IGNORECASE | re.MULTILINE | re.LOCALE):
        raise ConstraintError(_unsupported(expression, "the flags i, m and L"))
    dot_is_all = bool(flags & re.DOTALL) or wide
    return _Translation(expression, dot_is_all, wide).whole(list(parsed), search=search)


def _unsupported(expression: str, what: str) -> str:
    return f"The regular expression {expression!r} uses {what}, which is not supported."


@cache
def _unicode(letter: str) -> Ranges:
    """Every character that Python counts in a category: what some dialect counts in."""
    everything = "".join(map(chr, (*range(0xD800), *range(0xE000, LAST_CODE_POINT + 1))))
    found = re.finditer(rf"\{letter}+", everything)
    return merged((ord(run[0][0]), ord(run[0][-1])) for run in found)


class _Translation:
    """From the parser's items, (operator, argument), to nodes."""

    def __init__(self, expression: str, dot_is_all: bool, wide: bool) -> None:
        self._expression = expression
        self._wide = wide
        self._dot = Chars(complement(() if dot_is_all else ((0x0A, 0x0A),)))

    def whole(self, items: list[Any], *, search: bool) -> Node:
        """A whole expression: the one place where anchors have a meaning."""
        starts = bool(items) and items[0][0] is sre.AT and items[0][1] in _BEGINNING
        ends = len(items) > starts and items[-1][0] is sre.AT and items[-1][1] in _END
        inner = items[starts : len(items) - ends]
        if len(inner) == 1 and inner[0][0] is sre.BRANCH:
            options = [self._anchored(list(o), starts, ends, search) for o in inner[0][1][1]]
            return Choice(tuple(options))
        return self._anchored(inner, starts, ends, search)

    def _anchored(self, items: list[Any], starts: bool, ends: bool, search: bool) -> Node:
        while items and items[0][0] is sre.AT and items[0][1] in _BEGINNING:
            items, starts = items[1:], True
        while items and items[-1][0] is sre.AT and items[-1][1] in _END:
            items, ends = items[:-1], True
        before = EMPTY if starts or not search else ANYTHING
        # Python lets $ stand before a last line break.
        end = optional(Chars(((0x0A, 0x0A),))) if self._wide else EMPTY
        behind = end if ends or not search else ANYTHING
        return sequence(before, self._sequence(items), behind)

    def _sequence(self, items: Any) -> Node:
        return Sequence(tuple(self._item(operator, argument) for operator, argument in items))

    def _item(self, operator: Any, argument: Any) -> Node:
        if operator is sre.LITERAL:
            return Chars(((argument, argument),))
        if operator is sre.NOT_LITERAL:
            return Chars(complement(((argument, argument),)))
        if operator is sre.ANY:
            return self._dot
        if operator is sre.IN:
            return self._set(argument)
        if operator is sre.BRANCH:
            return Choice(tuple(map(self._sequence, argument[1])))
        if operator is sre.SUBPATTERN:
            _, flags_on, flags_off, inner = argument
            if flags_on or flags_off:
                raise ConstraintError(_unsupported(self._expression, "flags inside a group"))
            return self._sequence(inner)
        if operator in {sre.MAX_REPEAT, sre.MIN_REPEAT}:
            least, most, inner = argument
            unbounded = most is sre.MAXREPEAT
            return Repeat(self._sequence(inner), least, None if unbounded else most)
        what = _REFUSED.get(operator, str(operator))
        raise ConstraintError(_unsupported(self._expression, what))

    def _set(self, items: Any) -> Chars:
        negated = any(operator is sre.NEGATE for operator, _ in items)
        ranges: list[tuple[int, int]] = []
        for operator, argument in items:
            if operator is sre.LITERAL:
                ranges.append((argument, argument))
            elif operator is sre.RANGE:
                ranges.append(argument)
            elif operator is sre.CATEGORY:
                letter, inside = _CATEGORY[argument]
                # Where dialects differ, what is read at last is what all of them read.
                wide = (inside == negated) != self._wide
                known = _unicode(letter) if wide else _ASCII[letter]
                ranges += known if inside else complement(known)
        return Chars(complement(ranges) if negated else merged(ranges))
