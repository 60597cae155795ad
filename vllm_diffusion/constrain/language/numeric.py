"""Decimal numbers between bounds, and multiples -> syntax nodes.

Digit by digit: as long as what is written equals a bound's digits, the bound limits the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal, localcontext
from math import inf
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.regular import Multiples, intersect
from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    NOTHING,
    Call,
    Chars,
    Choice,
    Node,
    Repeat,
    choice,
    optional,
    sequence,
    text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Decimals of at most so many significant digits become different doubles, in the same order. More
# would let a text that is above an exclusive bound be read as the bound itself. An inclusive bound
# cannot be passed that way, unless it is no double.
_SIGNIFICANT = 15
_LARGEST_EXACT = 1 << 53

# Ends beyond these are as good as none to who sends the bounds of a double, as .NET and Java do: a
# state a digit is too much for them. Whole numbers of 256 bits are kept.
_MOST_DIGITS = 80
_LARGE = Decimal(10) ** 21
_MOST_PLACES = 20

_LARGEST_STEP = 1000
_LARGEST_DENOMINATOR = 1024


@dataclass(frozen=True, slots=True)
class Bound:
    """An end of a range of numbers."""

    value: Decimal
    exclusive: bool = False

    @classmethod
    def of(cls, number: float, *, exclusive: bool = False) -> Bound:
        """The bound that a JSON number means to who compares doubles, and big whole numbers."""
        if number in {inf, -inf}:
            raise ConstraintError(f"the bound {number} is no number")
        whole = number == int(number)
        return cls(Decimal(int(number)) if whole else Decimal(repr(number)), exclusive)

    @property
    def needs_care(self) -> bool:
        """Whether rounding to a double could bring a number over this end."""
        return self.exclusive or abs(self.value) > _LARGEST_EXACT

    def negated(self) -> Bound:
        """The same bound seen from the other side of zero."""
        # A minus sign would round to the digits of the context.
        return Bound(self.value.copy_negate() if self.value else self.value, self.exclusive)


def number_of(
    schema: Mapping[str, Any], prefix: str, *, whole: bool, any_integer: Node, any_number: Node
) -> tuple[Node, dict[str, Node]]:
    """What numbers of a schema look like, and rules that this calls.

    Args:
        schema: flat, of numbers.
        prefix: of the names of the rules.
        whole: without a fraction.
        any_integer, any_number: what they look like without bounds.

    Raises:
        ConstraintError: it cannot be followed; why.
    """
    low, high = bounds(schema)
    bounded = low is not None or high is not None
    if "multipleOf" not in schema:
        return between(
            low, high, whole=whole
        ) if bounded else any_integer if whole else any_number, {}
    # Multiples that are no whole numbers are left out.
    step = schema["multipleOf"]
    numerator, denominator = step.as_integer_ratio()
    if denominator > _LARGEST_DENOMINATOR or numerator > _LARGEST_STEP:
        raise ConstraintError(f"has 'multipleOf' {step}, which is kept up to {_LARGEST_STEP}")
    digits = between(low, high, whole=True) if bounded else any_integer
    if numerator == 1:
        return digits, {}
    rules = intersect([digits, Multiples(numerator)], prefix=prefix)
    return Call(next(iter(rules))), rules


def bounds(schema: Mapping[str, Any]) -> tuple[Bound | None, Bound | None]:
    """The ends of the range that a JSON schema of numbers names; None: unbounded on that side.

    An end of very many digits is taken a little further in.

    Raises:
        ConstraintError: no numbers of a length that can be kept are in it.
    """
    lows = [
        Bound.of(schema[key], exclusive=key != "minimum")
        for key in ("minimum", "exclusiveMinimum")
        if key in schema and schema[key] != -inf
    ]
    highs = [
        Bound.of(schema[key], exclusive=key != "maximum")
        for key in ("maximum", "exclusiveMaximum")
        if key in schema and schema[key] != inf
    ]
    low = max(lows, key=lambda bound: (bound.value, bound.exclusive), default=None)
    high = min(highs, key=lambda bound: (bound.value, not bound.exclusive), default=None)
    return _narrowed(low, high)


def _narrowed(low: Bound | None, high: Bound | None) -> tuple[Bound | None, Bound | None]:
    """A range inside, of fewer digits where they are very many.

    Raises ConstraintError where nothing would be left of a range that is not empty.
    """
    near_low, near_high = low and _inward(low, up=True), high and _inward(high, up=False)
    if near_low == low and near_high == high:
        return low, high
    if _is_empty(near_low, near_high) and not _is_empty(low, high):
        raise ConstraintError("the bounds leave only numbers of very many digits")
    return near_low, near_high


def _is_empty(low: Bound | None, high: Bound | None) -> bool:
    if low is None or high is None:
        return False
    return low.value > high.value or (low.value == high.value and (low.exclusive or high.exclusive))


def _inward(bound: Bound, *, up: bool) -> Bound:
    """An end that is not further out, of a number of digits that can be kept."""
    if not up:
        return _inward(bound.negated(), up=True).negated()
    if bound.value >= Decimal(10) ** _MOST_DIGITS:
        raise ConstraintError(f"the bound {bound.value:.3e} has more digits than can be kept")
    if bound.value <= -(Decimal(10) ** _MOST_DIGITS):
        return Bound(-_LARGE)
    with localcontext() as context:
        context.prec = 2 * _MOST_DIGITS + _MOST_PLACES
        context.rounding = ROUND_CEILING
        value = bound.value.quantize(Decimal(1).scaleb(-_MOST_PLACES))
    return bound if value == bound.value else Bound(value or Decimal(0))


def between(low: Bound | None, high: Bound | None, *, whole: bool) -> Node:
    """Numbers from ``low`` to ``high``, without exponent; None: unbounded on that side.

    Args:
        low: the lower end.
        high: the upper end.
        whole: without a fraction.
    """
    zero = Bound(Decimal(0), exclusive=True)
    options: list[Node] = []
    if low is None or low.value < 0:
        least = zero if high is None or high.value >= 0 else high.negated()
        below = _Range(least, low and low.negated(), whole=whole)
        options.append(sequence(text("-"), below.node()))
    if high is None or high.value >= 0:
        least = low if low is not None and low.value >= 0 else Bound(Decimal(0))
        options.append(_Range(least, high, whole=whole).node())
    return Choice(tuple(options))


class _Range:
    """Numbers that are not negative."""

    def __init__(self, low: Bound, high: Bound | None, *, whole: bool) -> None:
        self._low, self._high, self._whole = low, high, whole
        self._low_digits = _digits(low)
        self._high_digits = _digits(high) if high else ("", "")
        self._care = low.needs_care or (high is not None and high.needs_care)

    def node(self) -> Node:
        """What the numbers of the range look like."""
        shortest, longest = len(self._low_digits[0]), len(self._high_digits[0])
        if self._high is None:
            longer = sequence(_digit(1, 9), Repeat(_digit(0, 9), shortest))
            if not self._whole and shortest < _SIGNIFICANT:
                # From the next power of ten on, which is a double, nothing rounds down to the end.
                longer = sequence(longer, optional(sequence(text("."), Repeat(_digit(0, 9), 1))))
            return choice(self._digit_at(0, shortest, low=True, high=False), longer)
        return Choice(
            tuple(
                self._digit_at(0, length, low=length == shortest, high=length == longest)
                for length in range(shortest, longest + 1)
            )
        )

    def _digit_at(self, index: int, length: int, *, low: bool, high: bool) -> Node:
        """Digits from ``index`` on; those before equal the bounds named."""
        if index == length:
            return self._fraction(length, low, high)
        if not (low or high):
            rest = length - index
            first = [_digit(1, 9)] if index == 0 and length > 1 else []
            digits = Repeat(_digit(0, 9), rest - len(first), rest - len(first))
            return sequence(*first, digits, self._fraction(length, low, high))
        least = int(self._low_digits[0][index]) if low else int(index == 0 and length > 1)
        most = int(self._high_digits[0][index]) if high else 9
        return Choice(
            tuple(
                sequence(_digit(first, last), self._digit_at(index + 1, length, low=down, high=up))
                for first, last, (down, up) in _runs(least, most, low, high)
            )
        )

    def _fraction(self, length: int, low: bool, high: bool) -> Node:
        """A point and digits, or nothing, behind digits that equal the bounds named."""
        options: list[Node] = [EMPTY] if self._may_stop(0, low, high) else []
        if not self._whole:
            most = max(_SIGNIFICANT - length, 0) if self._care else None
            options.append(sequence(text("."), self._place_at(0, most, low, high)))
        return Choice(tuple(options))

    def _place_at(self, index: int, most: int | None, low: bool, high: bool) -> Node:
        """At least one digit of the fraction, at most ``most`` in all."""
        if index == most:
            return NOTHING
        if most is None and index >= len(self._low_digits[1]):
            low = False  # an inclusive bound, reached
        if not (low or high):
            return Repeat(_digit(0, 9), 1, None if most is None else most - index)
        if most is None and high and index >= len(self._high_digits[1]):
            return Repeat(_digit(0, 0), 1)
        least = int(self._low_digits[1][index : index + 1] or 0) if low else 0
        largest = int(self._high_digits[1][index : index + 1] or 0) if high else 9
        options: list[Node] = []
        for first, last, tight in _runs(least, largest, low, high):
            stop = [EMPTY] if self._may_stop(index + 1, *tight) else []
            more = self._place_at(index + 1, most, *tight)
            options.append(sequence(_digit(first, last), choice(*stop, more)))
        return Choice(tuple(options))

    def _may_stop(self, places: int, low: bool, high: bool) -> bool:
        """Whether the number may end here, zeros thought behind it."""
        equals_low = low and places >= len(self._low_digits[1])
        equals_high = high and places >= len(self._high_digits[1])
        above = not low or (equals_low and not self._low.exclusive)
        below = not equals_high or self._high is None or not self._high.exclusive
        return above and below


def _digits(bound: Bound) -> tuple[str, str]:
    """Digits before and behind the point, no zeros at either far end."""
    whole, _, fraction = f"{bound.value:f}".partition(".")
    return whole, fraction.rstrip("0")


def _digit(first: int, last: int) -> Chars:
    return Chars(((0x30 + first, 0x30 + last),))


def _runs(least: int, most: int, low: bool, high: bool) -> list[tuple[int, int, tuple[bool, bool]]]:
    """Digits ``least..most`` in runs: first, last, and which bounds they still equal."""
    if least > most:
        return []
    if least == most:
        return [(least, most, (low, high))]
    runs = []
    if low:
        runs.append((least, least, (True, False)))
        least += 1
    if high:
        runs.append((most, most, (False, True)))
        most -= 1
    if least <= most:
        runs.append((least, most, (False, False)))
    return runs
