"""One reading of rows over the vocabulary on a GPU: chunks of many tiles, three launches each.

    product    logits of a chunk, [R, n] in the model's dtype
    absorb     ``_absorb_chunk``: a program a row. Once over the row for its largest logit, once for
               weights against the largest so far, which take the place of the logits; tile by tile
               the draw of ``sample``, whose tiles these are. Where the largest has risen, what was
               summed of the soft embedding shrinks.
    product    onto the soft embedding, summed in fp32

and ``_finish_row`` once. The meaning is that of ``reading.read``, whose tiles are one product each:
64 of them at the released vocabulary, five launches a tile. Imported on a GPU alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from vllm_diffusion.denoise import philox
from vllm_diffusion.denoise.rng import Purpose
from vllm_diffusion.head import sample
from vllm_diffusion.head.fused import hyperbolic
from vllm_diffusion.head.tile import RunningStats
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.vocabulary import Vocabulary

_NEAR_CACHE: Final = 32 * 2**20
"""Bytes of a chunk that stay in the level-2 cache of a large GPU from product to product."""

_MOST_CHUNKS: Final = 8
"""Above it launches cost more than what a chunk beyond the cache is read from memory."""

_SAMPLE = tl.constexpr(int(Purpose.SAMPLE))
_MASKED = tl.constexpr(-3e30)  # as in ``tile``
_LOWEST = tl.constexpr(-1e30)
_NO_PLACE = tl.constexpr(2**31 - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """What is kept of the chunks read; nothing before the first, which writes it all."""

    values: Tensor  # [5, R] fp32: top, second, mass, moment, score of ``tile.RunningStats``
    tokens: Tensor  # [2, R] int64: argmax and sample
    soft: Tensor  # [R, H] fp32, sum of weight times embedding


def width(vocabulary: Vocabulary, rows: int, budget: int) -> int:
    """Ids of a chunk, whole tiles: what a step's logits may take, [rows, width], is the budget."""
    row = rows * vocabulary.output.element_size()
    wanted = max(_NEAR_CACHE // row, -(-len(vocabulary) // _MOST_CHUNKS))
    tiles = min(wanted, budget // row) // sample.TILE
    return max(1, tiles) * sample.TILE


def rows_at_once(vocabulary: Vocabulary, budget: int) -> int:
    """Rows of which a tile fits the budget."""
    return max(1, budget // (sample.TILE * vocabulary.output.element_size()))


def read(vocabulary: Vocabulary, rows: Rows, budget: int) -> CanvasStats:
    """Statistics of rows whose logits are what they are, and whose soft embedding is exact.

    Args:
        vocabulary: of this rank, read from the matrix itself.
        rows: without a rewrite.
        budget: bytes that the logits of a step may take.
    """
    hidden, temperature = rows.hidden, rows.temperature.contiguous()
    count, ids = len(rows), min(width(vocabulary, len(rows), budget), len(vocabulary))
    sums = _Sums(
        values=temperature.new_empty(5, count),
        tokens=rows.noise.position.new_empty(2, count),
        soft=temperature.new_empty(count, vocabulary.embedding.shape[1]),
    )
    buffer = hidden.new_empty(count * ids)
    for start in range(0, len(vocabulary), ids):
        output = vocabulary.output[start : start + ids]
        logits = buffer[: count * len(output)].view(count, len(output))
        torch.mm(hidden, output.T, out=logits)
        _absorb(vocabulary, replace(rows, temperature=temperature), logits, start, sums)
        part = vocabulary.embedding[start : start + ids]
        _accumulate(sums.soft, logits, part, fresh=start == 0)
    finished = _over_ranks if len(vocabulary) < vocabulary.size else _finished
    return finished(vocabulary, temperature, sums)


def _absorb(vocabulary: Vocabulary, rows: Rows, logits: Tensor, start: int, sums: _Sums) -> None:
    """Take in a chunk of logits [R, n], which become weights in their dtype."""
    noise, columns = rows.noise, logits.shape[1]
    block = max(16, triton.next_power_of_2(min(sample.TILE, columns)))
    _absorb_chunk[(len(rows),)](
        logits,
        columns,
        vocabulary.first + start,
        vocabulary.softcap or 0.0,
        rows.temperature,
        noise.seed.contiguous(),
        noise.position.contiguous(),
        noise.step.contiguous(),
        sums.values,
        sums.tokens,
        len(rows),
        sums.soft,
        sums.soft.shape[1],
        CAPPED=vocabulary.softcap is not None,
        FIRST=start == 0,
        WHOLE=columns % sample.TILE == 0 and block == sample.TILE,
        TILE=sample.TILE,
        BLOCK=block,
        num_warps=8,
    )


def _accumulate(soft: Tensor, weight: Tensor, embedding: Tensor, *, fresh: bool) -> None:
    """Add weight [R, n] @ embedding [n, H], summed in fp32, to [R, H] fp32."""
    if embedding.dtype == torch.float32 or soft.device.type == "cpu":
        soft.addmm_(weight.float(), embedding.float(), beta=0 if fresh else 1)
    elif fresh:
        torch.mm(weight, embedding, out_dtype=torch.float32, out=soft)
    else:
        torch.addmm(soft, weight, embedding, out_dtype=torch.float32, out=soft)


def _finished(vocabulary: Vocabulary, temperature: Tensor, sums: _Sums) -> CanvasStats:
    """What a row's sums say, on the one rank there is."""
    rows, hidden = sums.soft.shape
    entropy, top_prob, margin = temperature.new_empty(3, rows)
    embedding = vocabulary.embedding.new_empty(rows, hidden)
    scale = vocabulary.scale
    _finish_row[(rows,)](
        sums.values,
        rows,
        temperature,
        sums.soft,
        hidden,
        scale,
        entropy,
        top_prob,
        margin,
        embedding,
        SCALE_IN_MEMORY=isinstance(scale, torch.Tensor),
        BLOCK=min(1024, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return CanvasStats(
        argmax=sums.tokens[0],
        sample=sums.tokens[1],
        entropy=entropy,
        top_prob=top_prob,
        margin=margin,
        soft_embedding=embedding,
    )


def _over_ranks(vocabulary: Vocabulary, temperature: Tensor, sums: _Sums) -> CanvasStats:
    """The same of all ranks together."""
    top, second, mass, moment, score = sums.values
    running = RunningStats(
        top=top,
        second=second,
        mass=mass,
        moment=moment,
        score=score,
        argmax=sums.tokens[0],
        sample=sums.tokens[1],
    )
    together, shrink = running.over_ranks(temperature, vocabulary)
    soft = vocabulary.add(sums.soft.mul_((shrink / together.mass)[:, None]))
    soft = (soft * vocabulary.scale).to(vocabulary.embedding.dtype)
    return together.statistics(temperature, soft)


@triton.jit
def _two_best(
    line: tl.tensor,
    width: tl.tensor,
    WHOLE: tl.constexpr,  # noqa: N803 - Triton's way of writing constants
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest logit of a row of a chunk, the next one, and the first place of the largest."""
    column = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), _MASKED, tl.float32)
    second = tl.full((BLOCK,), _MASKED, tl.float32)
    place = tl.full((BLOCK,), _NO_PLACE, tl.int32)
    for start in range(0, width, TILE):
        x = _logits(line, start, width, WHOLE, TILE, BLOCK)
        rises = x > best
        second = tl.maximum(second, tl.minimum(x, best))
        place = tl.where(rises, start + column, place)
        best = tl.where(rises, x, best)
    top = tl.max(best, axis=0)
    where = tl.min(tl.where(best == top, place, _NO_PLACE), axis=0)
    next_best = tl.max(tl.where(place == where, second, best), axis=0)
    # A row of NaN gets some place in the chunk.
    return top, next_best, tl.minimum(where, width - 1)


@triton.jit
def _logits(  # noqa: PLR0917
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
def _absorb_chunk(  # noqa: PLR0915, PLR0917 - a kernel is one function, launched with positions
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
    CAPPED: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * width
    column = tl.arange(0, BLOCK)
    # The cap rises with the logit, so the largest before it is the largest behind it.
    top, second, where = _two_best(line, width, WHOLE, TILE, BLOCK)
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
        x = _logits(line, start, width, WHOLE, TILE, BLOCK)
        if CAPPED:
            x = _capped(x, softcap)
        scaled = (x - now) * coldness
        weight = tl.exp(scaled)
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
    if shrink < 1:
        _shrink_row(soft + row * hidden, hidden, shrink, BLOCK)


@triton.jit
def _finish_row(  # noqa: PLR0917
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
