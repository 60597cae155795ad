"""The Triton kernels of ``chunks``: a program a row. Imported where Triton's kernels are alone."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_diffusion.denoise import philox
from vllm_diffusion.denoise.rng import Purpose
from vllm_diffusion.head.fused import hyperbolic

_SAMPLE = tl.constexpr(int(Purpose.SAMPLE))
_MASKED = tl.constexpr(-3e30)  # as in ``tile``
_LOWEST = tl.constexpr(-1e30)
_NO_PLACE = tl.constexpr(2**31 - 1)


@triton.jit
def _two_best(
    line: tl.tensor,
    width: tl.tensor,
    WHOLE: tl.constexpr,  # noqa: N803 - Triton's way of writing constants
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The largest logit of a row of a chunk, the next one, and the first place of the largest.

    And [BLOCK] fp32, the largest of every lane: of the ids at the same place of all tiles.
    """
    column = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), _MASKED, tl.float32)
    second = tl.full((BLOCK,), _MASKED, tl.float32)
    place = tl.full((BLOCK,), _NO_PLACE, tl.int32)
    for start in range(0, width, TILE):
        x = tile_logits(line, start, width, WHOLE, TILE, BLOCK)
        rises = x > best
        second = tl.maximum(second, tl.minimum(x, best))
        place = tl.where(rises, start + column, place)
        best = tl.where(rises, x, best)
    top = tl.max(best, axis=0)
    where = tl.min(tl.where(best == top, place, _NO_PLACE), axis=0)
    next_best = tl.max(tl.where(place == where, second, best), axis=0)
    # A row of NaN gets some place in the chunk.
    return top, next_best, tl.minimum(where, width - 1), best


@triton.jit
def best_lanes(
    best: tl.tensor,
    LANES: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor]:
    """Which lanes [BLOCK] hold the largest numbers, ``LANES`` of them, and which one each is.

    Args:
        best: [BLOCK] fp32, of which the upper ``BITS`` bits say everything.
    """
    # As integers that are ordered as the numbers are.
    key = best.to(tl.int32, bitcast=True)
    key = (key ^ ((key >> 31) & 0x7FFFFFFF)) >> (32 - BITS)
    # The largest edge that so many reach, bit by bit.
    edge = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= LANES, 0, -(2 ** (BITS - 1)))
    for bit in tl.static_range(BITS - 1):
        trial = edge + (1 << (BITS - 2 - bit))
        edge = tl.where(tl.sum((key >= trial).to(tl.int32), axis=0) >= LANES, trial, edge)
    above = key > edge
    missing = LANES - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | ((key == edge) & (tl.cumsum((key == edge).to(tl.int32), axis=0) <= missing))
    return chosen, tl.cumsum(chosen.to(tl.int32), axis=0) - 1


@triton.jit
def tile_logits(  # noqa: PLR0917
    line: tl.tensor,
    start: tl.tensor,
    width: tl.tensor,
    WHOLE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """[BLOCK] fp32 of a tile, very little where it has no id."""
    column = tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(line + start + column).to(tl.float32)
    there = (column < TILE) & (start + column < width)
    return tl.load(line + start + column, mask=there, other=_MASKED).to(tl.float32)


@triton.jit
def _capped(x: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """The softcap, but for what stands for no logit."""
    # A product for every id in the place of a division.
    return tl.where(x > _LOWEST, hyperbolic(x * (1 / softcap)) * softcap, x)


@triton.jit
def _place_of(weight: tl.tensor, share: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:  # noqa: N803
    """The first place whose running sum is above its share, never one that adds nothing.

    A sum in parallel rounds, so past the last of them it is the last that has any weight.
    """
    column = tl.arange(0, BLOCK)
    running = tl.cumsum(weight, axis=0)
    above = (running > share * tl.max(running, axis=0)) & (weight > 0)
    last = tl.max(tl.where(weight > 0, column, 0), axis=0)
    return tl.minimum(tl.min(tl.where(above, column, BLOCK), axis=0), last)


@triton.jit
def _shrink_row(
    line: tl.tensor,
    width: tl.tensor,
    shrink: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(line + at, tl.load(line + at, mask=at < width) * shrink, mask=at < width)


@triton.jit
def absorb_chunk(  # noqa: PLR0915, PLR0917 - one function, launched with positions
    logits: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    softcap: tl.tensor,
    temperature: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    steps: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    soft: tl.tensor,
    hidden: tl.tensor,
    lanes: tl.tensor,
    listed: tl.tensor,
    lane_stride: tl.tensor,
    listed_stride: tl.tensor,
    CAPPED: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    WEIGHTS: tl.constexpr,  # noqa: N803
    LANES: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Take a row's logits of a chunk in, of whole tiles where ``WHOLE``.

    Args:
        logits: [R, width] model dtype; where ``WEIGHTS``, these take their place.
        first: id of the chunk's first column, a multiple of ``TILE``.
        softcap: where ``CAPPED``.
        temperature: [R] fp32.
        seeds, positions, steps: [R, 2], [R] and [R] int64, the key of every row's noise.
        values, tokens, soft: see ``chunks``; not read where ``FIRST``, and ``soft`` [R, hidden]
            only where ``WEIGHTS``.
        rows: R.
        lanes: [R, LANES] int32, ``lane_stride`` from row to row: the lanes of the largest logits.
        listed: [R, tiles, LANES] model dtype, ``listed_stride`` from row to row: their logits.
    """
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * width
    column = tl.arange(0, BLOCK)
    # The cap rises with the logit, so the largest before it is the largest behind it.
    top, second, where, best = _two_best(line, width, WHOLE, TILE, BLOCK)
    if LANES:
        chosen, rank = best_lanes(best, LANES, BITS)
        tl.store(lanes + row * lane_stride + rank, column, mask=chosen)
    if CAPPED:
        top, second = _capped(top, softcap), _capped(second, softcap)
    t = tl.load(temperature + row)
    if FIRST:
        now, shrink = top, tl.full((), 1.0, tl.float32)
        mass, moment = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
        leader = tl.full((), float("-inf"), tl.float32)
        drawn = tl.zeros((), tl.int32) + first
        tl.store(tokens + row, first + where)
    else:
        before = tl.load(values + row)
        now = tl.maximum(top, before)
        shift = (before - now) / t
        shrink = tl.exp(shift)
        second = tl.maximum(
            tl.load(values + rows + row), tl.maximum(second, tl.minimum(top, before))
        )
        mass = tl.load(values + 2 * rows + row)
        moment = shrink * (tl.load(values + 3 * rows + row) + shift * mass)
        mass *= shrink
        leader = tl.load(values + 4 * rows + row) + shift
        drawn = tl.load(tokens + rows + row).to(tl.int32)
        tl.store(tokens + row, first + where, mask=top > before)

    coldness = 1 / t
    seed = philox.seed_of(tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1))
    position, step = tl.load(positions + row), tl.load(steps + row)
    moments = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, TILE):
        x = tile_logits(line, start, width, WHOLE, TILE, BLOCK)
        if LANES:
            at = listed + row * listed_stride + start // TILE * LANES + rank
            tl.store(at, x.to(listed.dtype.element_ty), mask=chosen)
        if CAPPED:
            x = _capped(x, softcap)
        scaled = (x - now) * coldness
        weight = tl.exp(scaled)
        if WEIGHTS:
            there = WHOLE | ((column < TILE) & (start + column < width))
            tl.store(line + start + column, weight.to(logits.dtype.element_ty), mask=there)
        moments += weight * scaled
        tile_mass = tl.sum(weight, axis=0)
        mass += tile_mass
        tile = ((first + start) // TILE).to(tl.int64)
        word, other, _, _ = philox.words(seed, position, step, _SAMPLE, tile)
        score = tl.log(tile_mass) - tl.log(-tl.log(philox.uniform(word)))
        if score > leader:
            leader = score
            drawn = first + start + _place_of(weight, philox.uniform(other), BLOCK)
    tl.store(values + row, now)
    tl.store(values + rows + row, second)
    tl.store(values + 2 * rows + row, mass)
    tl.store(values + 3 * rows + row, moment + tl.sum(moments, axis=0))
    tl.store(values + 4 * rows + row, leader)
    tl.store(tokens + rows + row, drawn)
    if WEIGHTS and shrink < 1:
        _shrink_row(soft + row * hidden, hidden, shrink, BLOCK)


@triton.jit
def finish_row(  # noqa: PLR0917
    values: tl.tensor,
    rows: tl.tensor,
    temperature: tl.tensor,
    soft: tl.tensor,
    hidden: tl.tensor,
    scale: tl.tensor,
    entropies: tl.tensor,
    top_probs: tl.tensor,
    margins: tl.tensor,
    embeddings: tl.tensor,
    SCALE_IN_MEMORY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Statistics of a row from its sums, see ``tile.RunningStats.statistics``.

    Args:
        values: [5, rows] fp32, see ``chunks``.
        temperature: [rows] fp32.
        soft: [rows, hidden] fp32.
        scale: one number, or where it lies.
        entropies, top_probs, margins: [rows] fp32, written.
        embeddings: [rows, hidden] model dtype, written.
    """
    row = tl.program_id(0).to(tl.int64)
    top, second = tl.load(values + row), tl.load(values + rows + row)
    mass, moment = tl.load(values + 2 * rows + row), tl.load(values + 3 * rows + row)
    beside = tl.exp((second - top) / tl.load(temperature + row))
    tl.store(entropies + row, tl.log(mass) - moment / mass)
    tl.store(top_probs + row, 1 / mass)
    tl.store(margins + row, (1 - beside) / mass)
    factor = tl.load(scale).to(tl.float32) if SCALE_IN_MEMORY else scale
    for start in range(0, hidden, BLOCK):
        at = start + tl.arange(0, BLOCK)
        summed = tl.load(soft + row * hidden + at, mask=at < hidden)
        # Scaled first: one rounding, and the only large one.
        mean = summed / mass * factor
        tl.store(
            embeddings + row * hidden + at, mean.to(embeddings.dtype.element_ty), mask=at < hidden
        )
