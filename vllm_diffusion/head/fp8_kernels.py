"""Triton kernels around a chunk's fp8 product: hidden rows in, the best ids of a row exact behind.

Imported where Triton's kernels are alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_diffusion.head.chunk_kernels import best_lanes, tile_logits

_MASKED = tl.constexpr(-3e30)  # as in ``tile``
_LARGEST = tl.constexpr(448.0)  # of E4M3
_SMALLEST = tl.constexpr(2.0**-126)
_NORMAL = tl.constexpr(2.0**-6)  # below it E4M3's numbers are 2**-9 apart
_STEPS_OF_512TH = tl.constexpr(1.5 * 2**14)  # fp32's numbers around it are, too


@triton.jit
def _nearest(x: tl.tensor) -> tl.tensor:
    """The nearest number of E4M3, the even one of two; up to its largest.

    With it a conversion has nothing left to round, in the way of this device or that.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three bits of the mantissa are left
    few = (x + _STEPS_OF_512TH) - _STEPS_OF_512TH
    near = tl.where(tl.abs(x) < _NORMAL, few, bits.to(tl.float32, bitcast=True))
    return tl.where(x == x, near, x)  # noqa: PLR0124 - NaN


@triton.jit
def round_row(  # noqa: PLR0917 - launched with positions
    hidden: tl.tensor,
    stride: tl.tensor,
    inputs: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's way of writing constants
) -> None:
    """A row in E4M3, its largest magnitude E4M3's largest number; a program a row.

    Args:
        hidden: [R, inputs] model dtype, ``stride`` from row to row.
        codes: [R, inputs] E4M3, written.
        scales: [R] fp32, written: what codes are multiplied with.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    x = tl.load(hidden + row * stride + at, mask=at < inputs, other=0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0) / _LARGEST, _SMALLEST)
    unknown = tl.max((x != x).to(tl.int32), axis=0) > 0  # noqa: PLR0124 - NaN, which max leaves out
    scale = tl.where(unknown, float("nan"), scale)
    tl.store(scales + row, scale)
    code = _nearest(tl.div_rn(x, scale))
    tl.store(codes + row * inputs + at, code.to(codes.dtype.element_ty), mask=at < inputs)


@triton.jit
def rescore_row(  # noqa: PLR0917
    logits: tl.tensor,
    width: tl.tensor,
    hidden: tl.tensor,
    hidden_stride: tl.tensor,
    output: tl.tensor,
    output_stride: tl.tensor,
    inputs: tl.tensor,
    places: tl.tensor,
    COUNT: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    TILES: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    PIECE: tl.constexpr,  # noqa: N803
) -> None:
    """The exact logits of a row's best ids of a chunk, in the place of the rounded ones.

    A lane is a place in a tile. The best ids are in the lanes whose largest logits are the largest,
    and these are sought there: the row itself is read once.

    Args:
        logits: [R, width] model dtype; changed.
        hidden: [R, inputs] model dtype, ``hidden_stride`` from row to row.
        output: [width, inputs] model dtype, of these ids, ``output_stride`` from row to row.
        places: [R, COUNT] int32, where the program keeps what it has found.
        COUNT: ids of a row, a power of two, at most ``BLOCK``.
        BITS: of a logit, see ``best_lanes``.
        TILES: of the chunk, or the next power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    line, mine = logits + row * width, places + row * COUNT
    best = tl.full((BLOCK,), _MASKED, tl.float32)
    for start in range(0, width, TILE):
        best = tl.maximum(best, tile_logits(line, start, width, WHOLE, TILE, BLOCK))
    chosen, rank = best_lanes(best, COUNT, BITS)
    tl.store(mine + rank, tl.arange(0, BLOCK), mask=chosen)
    tl.debug_barrier()
    number = tl.arange(0, TILES * COUNT)
    place = number // COUNT * TILE + tl.load(mine + number % COUNT)
    x = tl.load(line + place, mask=place < width, other=_MASKED).to(tl.float32)
    chosen, rank = best_lanes(x, COUNT, BITS)
    tl.debug_barrier()
    tl.store(mine + rank, place, mask=chosen)
    tl.debug_barrier()
    place = tl.load(mine + tl.arange(0, COUNT))
    there = place < width  # a chunk may have fewer ids
    total = tl.zeros((COUNT, PIECE), tl.float32)
    theirs = output + place.to(tl.int64)[:, None] * output_stride
    for start in range(0, inputs, PIECE):
        at = start + tl.arange(0, PIECE)
        state = tl.load(hidden + row * hidden_stride + at, mask=at < inputs, other=0)
        weight = tl.load(theirs + at[None], mask=there[:, None] & (at < inputs)[None], other=0)
        total += weight.to(tl.float32) * state.to(tl.float32)[None]
    exact = tl.sum(total, axis=1)
    tl.store(line + place, exact.to(logits.dtype.element_ty), mask=there)
