"""How UTF-8 spells a range of code points: as sequences of byte ranges."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ByteRanges = tuple[tuple[int, int], ...]

_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)
_SURROGATES = (0xD800, 0xDFFF)


def spellings(first: int, last: int) -> Iterator[ByteRanges]:
    """Byte ranges, one after the other, that together spell ``first..last``, surrogates left out.

    Every spelling is a sequence of ranges (first byte, last byte); any byte of each range will do.
    """
    low, high = _SURROGATES
    for start, stop in ((first, min(last, low - 1)), (max(first, high + 1), last)):
        begin = start
        for limit in _LAST_OF_LENGTH:
            if begin <= min(stop, limit):
                yield from _same_length(begin, min(stop, limit))
                begin = limit + 1


def _same_length(first: int, last: int) -> Iterator[ByteRanges]:
    """Split where the bytes behind the leading one do not run through all of 80..BF."""
    length = len(chr(first).encode())
    for behind in range(1, length):
        mask = (1 << (6 * behind)) - 1
        if first | mask < last:
            if first & mask:
                yield from _same_length(first, first | mask)
                yield from _same_length((first | mask) + 1, last)
                return
            if last & mask != mask:
                yield from _same_length(first, (last & ~mask) - 1)
                yield from _same_length(last & ~mask, last)
                return
    yield tuple(zip(chr(first).encode(), chr(last).encode(), strict=True))
