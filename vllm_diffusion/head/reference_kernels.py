"""``reference.row_statistics`` as one Triton kernel for GPUs: a program a row of logits.

Imported on a GPU alone, for models without self-conditioning: there the torch form takes some 150
launches and a dozen passes over the logits. The draw is the definition's without its bins: a
running sum over a whole tile costs nothing in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_diffusion.constrain.logits import truncate_logits
from vllm_diffusion.denoise import philox
from vllm_diffusion.denoise.rng import Purpose
from vllm_diffusion.head import sample
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.rows import Rows

_SAMPLE = tl.constexpr(int(Purpose.SAMPLE))
_MASKED = tl.constexpr(-3e30)  # as in ``tile``
_NO_PLACE = tl.constexpr(2**31 - 1)


def row_statistics(logits: Tensor, own: Tensor, rows: Rows) -> CanvasStats:
    """Statistics of rows of a model that is not conditioned on itself.

    Args:
        logits: [R, V] fp32, rewritten.
        own: [R, V] fp32, before the rewrite.
        rows: these rows; the part of their rewrite before the temperature is already applied.
    """
    assert not rows.self_conditioning
    rewrite, temperature, greedy = rows.rewrite, rows.temperature.contiguous(), None
    if rewrite is not None and rewrite.truncation is not None:
        logits = truncate_logits(logits / temperature[:, None], rewrite)
        temperature = torch.ones_like(temperature)
    if rewrite is not None and rewrite.greedy is not None:
        greedy = rewrite.greedy[rewrite.canvas]
    num, vocab = logits.shape
    numbers = torch.empty(5, num, device=logits.device)
    tokens = torch.empty(2, num, dtype=torch.int64, device=logits.device)
    _read_row[(num,)](
        logits.contiguous(),
        own.contiguous() if rows.own_prob else None,
        vocab,
        temperature,
        rows.noise.seed.contiguous(),
        rows.noise.position.contiguous(),
        rows.noise.step.contiguous(),
        greedy,
        numbers,
        tokens,
        num,
        TILE=sample.TILE,
        BLOCK=max(16, min(sample.TILE, triton.next_power_of_2(vocab))),
        num_warps=8,
    )
    return CanvasStats(
        argmax=tokens[0],
        sample=tokens[1],
        entropy=numbers[0],
        top_prob=numbers[1],
        margin=numbers[2],
        soft_embedding=None,
        sample_prob=numbers[3] if rows.sample_prob else None,
        own_prob=numbers[4] if rows.own_prob else None,
    )


@triton.jit
def _tile(line: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """Logits of a tile, those that are not there or are -inf as a number that has no weight."""
    x = tl.load(line + at, mask=inside, other=_MASKED)
    return tl.where(x < _MASKED, _MASKED, x)


@triton.jit
def _read_row(  # noqa: PLR0915, PLR0917 - a kernel takes positional arguments, once
    logits: tl.tensor,
    own: tl.tensor,
    vocab: tl.tensor,
    temperatures: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    steps: tl.tensor,
    greedies: tl.tensor,
    numbers: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    TILE: tl.constexpr,  # noqa: N803 - Triton's naming of constants
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Read a row tile by tile, its sums relative to the largest logit so far.

    Args:
        logits: [R, V] fp32.
        own: [R, V] fp32, or None where nobody asks for the token's own probability.
        vocab: V.
        temperatures: [R] fp32.
        seeds, positions, steps: [R, 2], [R] and [R] int64, the key of every row's noise.
        greedies: [R] bool, rows whose argmax counts as drawn; None for none.
        numbers: [5, R] fp32, written: entropy, top probability, margin, and the token's two
            probabilities.
        tokens: [2, R] int64, written: argmax and the token drawn.
        rows: R.
    """
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * vocab
    column = tl.arange(0, BLOCK)
    t = tl.load(temperatures + row)
    seed = philox.seed_of(tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1))
    position, step = tl.load(positions + row), tl.load(steps + row)

    top, second = tl.full((), _MASKED, tl.float32), tl.full((), _MASKED, tl.float32)
    place = tl.zeros((), tl.int32)
    mass, moment = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
    leader = tl.full((), float("-inf"), tl.float32)
    drawn_from = tl.zeros((), tl.int32)
    share = tl.zeros((), tl.float32)
    own_top, own_mass = tl.full((), _MASKED, tl.float32), tl.zeros((), tl.float32)
    for start in range(0, vocab, TILE):
        at = start + column
        inside = (column < TILE) & (at < vocab)
        x = _tile(line, at, inside)
        here = tl.max(x, axis=0)
        # Of equals the first; a row of NaN gets some place in the tile.
        where = tl.min(tl.where((x == here) & inside, at, _NO_PLACE), axis=0)
        where = tl.minimum(where, vocab - 1)
        next_best = tl.max(tl.where(at == where, _MASKED, x), axis=0)
        second = tl.maximum(tl.maximum(tl.minimum(here, top), second), next_best)
        place = tl.where(here > top, where, place)
        now = tl.maximum(here, top)
        shift = (top - now) / t
        shrink = tl.exp(shift)
        scaled = (x - now) / t
        weight = tl.where(inside, tl.exp(scaled), 0.0)
        tile_mass = tl.sum(weight, axis=0)
        moment = shrink * (moment + shift * mass) + tl.sum(weight * scaled, axis=0)
        mass = shrink * mass + tile_mass
        top = now

        tile = (tl.zeros((), tl.int64) + start) // TILE
        word, other, _, _ = philox.words(seed, position, step, _SAMPLE, tile)
        score = tl.log(tile_mass) - tl.log(-tl.log(philox.uniform(word)))
        leader += shift
        drawn = score > leader
        leader = tl.where(drawn, score, leader)
        drawn_from = tl.where(drawn, start, drawn_from)
        share = tl.where(drawn, philox.uniform(other), share)

        if own is not None:
            y = _tile(own + row * vocab, at, inside)
            own_now = tl.maximum(tl.max(y, axis=0), own_top)
            own_weight = tl.where(inside, tl.exp(y - own_now), 0.0)
            own_mass = own_mass * tl.exp(own_top - own_now) + tl.sum(own_weight, axis=0)
            own_top = own_now

    # The first id whose running sum is above its share, never one that adds nothing: a sum in
    # parallel rounds, so past the last of them it is the last that has any weight.
    at = drawn_from + column
    inside = (column < TILE) & (at < vocab)
    x = _tile(line, at, inside)
    weight = tl.where(inside, tl.exp((x - tl.max(x, axis=0)) / t), 0.0)
    cumulative = tl.cumsum(weight, axis=0)
    target = share * tl.max(cumulative, axis=0)
    chosen = tl.min(tl.where((cumulative > target) & (weight > 0), column, BLOCK), axis=0)
    chosen = drawn_from + tl.minimum(chosen, tl.max(tl.where(weight > 0, column, 0), axis=0))
    if greedies is not None:
        chosen = tl.where(tl.load(greedies + row) != 0, place, chosen)

    tl.store(tokens + row, place.to(tl.int64))
    tl.store(tokens + rows + row, chosen.to(tl.int64))
    tl.store(numbers + row, tl.log(mass) - moment / mass)
    tl.store(numbers + rows + row, 1 / mass)
    tl.store(numbers + 2 * rows + row, (1 - tl.exp((second - top) / t)) / mass)
    prob = tl.exp((tl.load(line + chosen) - top) / t) / mass
    tl.store(numbers + 3 * rows + row, prob)
    if own is not None:
        own_prob = tl.exp(tl.load(own + row * vocab + chosen) - own_top) / own_mass
        tl.store(numbers + 4 * rows + row, own_prob)
