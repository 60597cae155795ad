"""``attention.ranges`` as Triton kernels for GPUs, one launch each.

Imported only on a GPU. Arguments and results are those of the definition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SEQUENCES = 128  # sequences per program
_ROWS = 256
_BLOCKS = 128
_PROGRAMS = 8  # most programs that share the rows of a sequence

NO_RANGE = tl.constexpr(-1)  # as in ``attention.ranges``


def mark_sequences(
    phase: Tensor, slots: Tensor, causal: Tensor, *, text: Tensor | None = None
) -> None:
    """See ``attention.ranges.mark_sequences``."""
    count = causal.shape[0]
    _mark[(triton.cdiv(count, _SEQUENCES),)](
        phase, slots, causal, slots.shape[0], count, text, None, None, None, None, _SEQUENCES
    )


def mark_parts(
    phase: Tensor,
    slots: Tensor,
    lens: Tensor,
    request: Tensor,
    behind: Tensor,
    text: Tensor,
    causal: Tensor,
    part_lens: Tensor,
) -> None:
    """See ``attention.ranges.mark_parts``."""
    count = causal.shape[0]
    _mark[(triton.cdiv(count, _SEQUENCES),)](
        phase, slots, causal, count, count, text, request, behind, lens, part_lens, _SEQUENCES
    )


def write_sequence_ranges(
    causal: Tensor, starts: Tensor, lens: Tensor, window: int, ranges: Tensor
) -> None:
    """See ``attention.ranges.write_sequence_ranges``."""
    count = causal.shape[0]
    _sequence_ranges[(triton.cdiv(count, _SEQUENCES),)](
        causal, starts, lens, ranges, count, window, _SEQUENCES
    )


def write_row_ranges(
    causal: Tensor,
    starts: Tensor,
    lens: Tensor,
    window: int,
    block: int,
    longest: int,
    ranges: Tensor,
    view_lens: Tensor,
    first_blocks: Tensor,
) -> None:
    """See ``attention.ranges.write_row_ranges``."""
    count = causal.shape[0]
    # One more than there are sequences: for the rows after all of them.
    _row_ranges[(count + 1, min(_PROGRAMS, triton.cdiv(longest, _ROWS)))](
        causal,
        starts,
        lens,
        ranges,
        view_lens,
        first_blocks,
        count,
        ranges.shape[0],
        window,
        block,
        _ROWS,
    )


def gather_blocks(
    tables: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    rows: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    """See ``attention.ranges.gather_blocks``; one launch for all tables."""
    table, view = tables[0], out[0]
    count, width = view.shape
    _gather[(count, triton.cdiv(width, _BLOCKS), len(tables))](
        tuple(tables),
        table.stride(0),
        table.shape[1],
        tuple(out),
        view.stride(0),
        width,
        rows,
        first,
        _BLOCKS,
    )


@triton.jit(do_not_specialize=["count", "padded"])
def _mark(
    phase: tl.tensor,
    slots: tl.tensor,
    causal: tl.tensor,
    count: tl.tensor,
    padded: tl.tensor,
    text: tl.tensor,
    request: tl.tensor,
    behind: tl.tensor,
    lens: tl.tensor,
    part_lens: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's custom for compile-time arguments
) -> None:
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = sequence < count
    of = sequence
    if request is not None:
        of = tl.load(request + sequence, mask=real, other=0)
        length = tl.load(lens + of, mask=real, other=0)
        length -= tl.load(behind + sequence, mask=real, other=0)
        tl.store(part_lens + sequence, length, mask=real)
    slot = tl.load(slots + of, mask=real, other=0)
    flag = tl.load(phase + slot, mask=real, other=0).to(tl.int32)
    if text is not None:
        flag = ((flag | tl.load(text + sequence, mask=real, other=0)) > 0).to(tl.int32)
    tl.store(causal + sequence, flag, mask=sequence < padded)


@triton.jit(do_not_specialize=["count", "window"])
def _sequence_ranges(
    causal: tl.tensor,
    starts: tl.tensor,
    lens: tl.tensor,
    ranges: tl.tensor,
    count: tl.tensor,
    window: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = sequence < count
    canvas = tl.load(causal + sequence, mask=real, other=1) == 0
    start = tl.load(starts + sequence, mask=real, other=0)
    end = tl.load(starts + sequence + 1, mask=real, other=0)
    length = tl.load(lens + sequence, mask=real, other=0)
    first = tl.maximum(length - (end - start) - window + 1, 0)
    tl.store(ranges + 2 * sequence, tl.where(canvas, first, 0), mask=real)
    tl.store(ranges + 2 * sequence + 1, tl.where(canvas, length - 1, 0), mask=real)


@triton.jit(do_not_specialize=["count", "tokens", "window"])
def _row_ranges(
    causal: tl.tensor,
    starts: tl.tensor,
    lens: tl.tensor,
    ranges: tl.tensor,
    view_lens: tl.tensor,
    first_blocks: tl.tensor,
    count: tl.tensor,
    tokens: tl.tensor,
    window: tl.tensor,
    block: tl.tensor,
    ROWS: tl.constexpr,  # noqa: N803
) -> None:
    sequence = tl.program_id(0)
    real = sequence < count
    start = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1, mask=real, other=0)
    end = tl.where(real, end, tokens)
    length = tl.load(lens + sequence, mask=real, other=0)
    canvas = tl.load(causal + sequence, mask=real, other=1) == 0
    first = tl.maximum(length - (end - start) - window + 1, 0)
    skipped = first // block
    whole = tl.program_id(1) == 0
    tl.store(first_blocks + sequence, skipped, mask=real & whole)
    skipped = skipped * block
    tl.store(view_lens + sequence, length - skipped, mask=real & whole)
    begin = tl.where(canvas, first - skipped, NO_RANGE)
    last = tl.where(canvas, length - 1 - skipped, NO_RANGE)
    step = ROWS * tl.num_programs(1)
    for at in range(start + ROWS * tl.program_id(1), end, step):
        row = at + tl.arange(0, ROWS)
        nothing = tl.zeros((ROWS,), tl.int32)
        tl.store(ranges + 2 * row, nothing + begin, mask=row < end)
        tl.store(ranges + 2 * row + 1, nothing + last, mask=row < end)


@triton.jit(do_not_specialize=["blocks", "width"])
def _gather(
    tables: tl.tuple,
    table_stride: tl.tensor,
    blocks: tl.tensor,
    out: tl.tuple,
    out_stride: tl.tensor,
    width: tl.tensor,
    rows: tl.tensor,
    first: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    sequence = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = sequence
    if rows is not None:
        row = tl.load(rows + sequence)
    source = column
    if first is not None:
        source = column + tl.load(first + sequence)
    inside = column < width
    source = row.to(tl.int64) * table_stride + tl.minimum(source, blocks - 1)
    place = sequence.to(tl.int64) * out_stride + column
    for number in tl.static_range(len(tables)):
        if tl.program_id(2) == number:
            taken = tl.load(tables[number] + source, mask=inside, other=0)
            tl.store(out[number] + place, taken, mask=inside)
