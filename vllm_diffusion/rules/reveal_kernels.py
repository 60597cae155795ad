"""``reveal`` as Triton kernels, one program per canvas; results are equal to its bit for bit.

Imported only on a GPU. ``Reveal`` is the definition. A position's rank is the number of open
positions that come before it: all of them are compared, as a canvas has at most some hundred.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from vllm_diffusion.denoise import philox
from vllm_diffusion.denoise.constants import REVEAL_BY
from vllm_diffusion.denoise.rng import Purpose
from vllm_diffusion.records import Commit, Decision, Noise, StopReason
from vllm_diffusion.rules.reveal import Reveal

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import CanvasBatch, CanvasStats

_SETTLED = tl.constexpr(int(StopReason.SETTLED))
_STEPS = tl.constexpr(int(StopReason.STEPS))
_REVEAL = tl.constexpr(int(Purpose.REVEAL))
_DRAWN = tl.constexpr(REVEAL_BY.index("drawn"))
_MODEL = tl.constexpr(REVEAL_BY.index("model"))
_ENTROPY = tl.constexpr(REVEAL_BY.index("entropy"))
_MARGIN = tl.constexpr(REVEAL_BY.index("margin"))
_RANDOM = tl.constexpr(REVEAL_BY.index("random"))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

_COMPARED = tl.constexpr(32)  # positions that all others are compared with per iteration
_WARPS: Final = 4


class RevealKernels(Reveal):
    """The rule on a GPU: two launches per step."""

    def keyed(
        self, pool: CanvasPool, batch: CanvasBatch, factor: Tensor | None = None
    ) -> tuple[Tensor, Noise]:
        """See ``Rule.keyed``."""
        num, length = batch.position.shape
        temperature = torch.empty(num * length, device=pool.device)
        step = torch.empty(num * length, dtype=torch.int64, device=pool.device)
        seed = step.new_empty(num * length, 2)
        _key_rows[(num,)](
            batch.slots,
            temperature if factor is None else factor,
            pool.step,
            pool.seed,
            temperature,
            seed,
            step,
            FACTOR=factor is not None,
            LENGTH=length,
            BLOCK=triton.next_power_of_2(length),
        )
        return temperature, Noise(seed=seed, position=batch.position.flatten(), step=step)

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """See ``Reveal.decide``."""
        num, length = batch.position.shape
        accept = torch.empty_like(batch.valid)
        finished = accept.new_empty(num)
        next_tokens, reason = torch.empty_like(batch.position), torch.empty_like(batch.slots)
        count = torch.empty_like(batch.width)
        assert pool.ends is not None
        sample_prob, own_prob = stats.sample_prob, stats.own_prob
        _decide_canvas[(num,)](
            batch.slots,
            batch.width,
            batch.position,
            stats.sample.contiguous(),
            None if sample_prob is None else sample_prob.contiguous(),
            None if own_prob is None else own_prob.contiguous(),
            stats.entropy.contiguous(),
            stats.margin.contiguous(),
            pool.tokens,
            pool.seed,
            pool.step,
            pool.constants.max_steps,
            pool.constants.reveal_threshold,
            pool.constants.reveal_by,
            pool.ends,
            accept,
            next_tokens,
            finished,
            reason,
            count,
            ENDS=pool.ends.shape[1],
            MASK=self.mask_id,
            OTHER=self.not_a_mask,
            GRID=self.block or 0,
            LENGTH=length,
            BLOCK=triton.next_power_of_2(length),
            num_warps=_WARPS,
        )
        return Decision(
            accept=accept,
            next_tokens=next_tokens,
            finished=finished,
            reason=reason,
            commit=Commit(tokens=next_tokens, count=count),
        )


@triton.jit
def _key_rows(  # noqa: PLR0917 - kernels take positional arguments
    slots: tl.tensor,
    factors: tl.tensor,
    steps: tl.tensor,
    seeds: tl.tensor,
    temperatures: tl.tensor,
    row_seeds: tl.tensor,
    row_steps: tl.tensor,
    FACTOR: tl.constexpr,  # noqa: N803 - Triton's naming of constants
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    canvas = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    there = offset < LENGTH
    slot = tl.load(slots + canvas)
    temperature = tl.full((BLOCK,), 1.0, tl.float32)
    if FACTOR:
        temperature = temperature * tl.load(factors + canvas)
    row = canvas * LENGTH + offset
    zero = tl.zeros_like(row)
    tl.store(temperatures + row, temperature, mask=there)
    tl.store(row_steps + row, zero + tl.load(steps + slot), mask=there)
    tl.store(row_seeds + 2 * row, zero + tl.load(seeds + 2 * slot), mask=there)
    tl.store(row_seeds + 2 * row + 1, zero + tl.load(seeds + 2 * slot + 1), mask=there)


@triton.jit
def _score(  # noqa: PLR0917
    by: tl.tensor,
    row: tl.tensor,
    there: tl.tensor,
    offset: tl.tensor,
    positions: tl.tensor,
    sample_probs: tl.tensor,
    own_probs: tl.tensor,
    entropies: tl.tensor,
    margins: tl.tensor,
    seed: tl.tensor,
    step: tl.tensor,
) -> tl.tensor:
    """The score of some positions of a canvas, what is not finite as the lowest there is."""
    score = -offset.to(tl.float32)
    if sample_probs is not None:
        score = tl.where(by == _DRAWN, tl.load(sample_probs + row, mask=there, other=0.0), score)
    if own_probs is not None:
        score = tl.where(by == _MODEL, tl.load(own_probs + row, mask=there, other=0.0), score)
    if by == _ENTROPY:
        score = -tl.load(entropies + row, mask=there, other=0.0)
    if by == _MARGIN:
        score = tl.load(margins + row, mask=there, other=0.0)
    if by == _RANDOM:
        position = tl.load(positions + row, mask=there, other=0)
        word, _, _, _ = philox.words(seed, position, step, _REVEAL, step * 0)
        score = philox.uniform(word)
    return tl.where(tl.abs(score) < float("inf"), score, _LOWEST)


@triton.jit
def _decide_canvas(  # noqa: PLR0917
    slots: tl.tensor,
    widths: tl.tensor,
    positions: tl.tensor,
    samples: tl.tensor,
    sample_probs: tl.tensor,
    own_probs: tl.tensor,
    entropies: tl.tensor,
    margins: tl.tensor,
    pool_tokens: tl.tensor,
    seeds: tl.tensor,
    steps: tl.tensor,
    limits: tl.tensor,
    thresholds: tl.tensor,
    bys: tl.tensor,
    ends: tl.tensor,
    accepts: tl.tensor,
    next_tokens: tl.tensor,
    finisheds: tl.tensor,
    reasons: tl.tensor,
    counts: tl.tensor,
    ENDS: tl.constexpr,  # noqa: N803
    MASK: tl.constexpr,  # noqa: N803
    OTHER: tl.constexpr,  # noqa: N803
    GRID: tl.constexpr,  # noqa: N803
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    canvas = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    there = offset < LENGTH
    slot, width = tl.load(slots + canvas), tl.load(widths + canvas)
    step, limit = tl.load(steps + slot), tl.load(limits + slot)
    by, threshold = tl.load(bys + slot), tl.load(thresholds + slot)
    seed = philox.seed_of(tl.load(seeds + 2 * slot), tl.load(seeds + 2 * slot + 1))
    row, mine = canvas * LENGTH + offset, slot * LENGTH + offset
    token = tl.load(pool_tokens + mine, mask=there, other=0)
    is_open = (token == MASK) & (offset < width) & there
    score = _score(
        by,
        row,
        there,
        offset,
        positions,
        sample_probs,
        own_probs,
        entropies,
        margins,
        seed,
        step,
    )

    num_open = tl.sum(is_open.to(tl.int64), axis=0)
    if GRID > 0:
        share = GRID // limit + (step < GRID % limit).to(tl.int64)
    else:
        left = tl.maximum(limit - step, 1)
        share = (num_open + left - 1) // left
    last = step + 1 >= limit
    least = tl.where(last, num_open, tl.minimum(share, num_open))

    rank = tl.zeros_like(offset)
    for first in range(0, BLOCK, _COMPARED):
        other = first + tl.arange(0, _COMPARED)
        inside = other < LENGTH
        theirs = _score(
            by,
            canvas * LENGTH + other,
            inside,
            other,
            positions,
            sample_probs,
            own_probs,
            entropies,
            margins,
            seed,
            step,
        )
        theirs_open = tl.load(pool_tokens + slot * LENGTH + other, mask=inside, other=0) == MASK
        theirs_open = theirs_open & (other < width) & inside
        before = theirs[None, :] > score[:, None]
        before |= (theirs[None, :] == score[:, None]) & (other[None, :] < offset[:, None])
        rank += tl.sum((before & theirs_open[None, :]).to(tl.int32), axis=1)

    above = score > tl.where(threshold > 0, threshold, float("inf"))
    accept = is_open & (above | (rank < least))
    sample = tl.load(samples + row, mask=there, other=0)
    said = tl.where(sample == MASK, OTHER, sample)
    tl.store(accepts + row, accept, mask=there)
    token = tl.where(accept, said, token)
    tl.store(next_tokens + row, token, mask=there)

    first_mask = tl.min(tl.where((token == MASK) & there, offset, BLOCK), axis=0)
    is_end = offset < 0
    for number in range(ENDS):
        is_end |= token == tl.load(ends + slot * ENDS + number)
    is_end = is_end & (offset < width) & there
    first_end = tl.min(tl.where(is_end, offset, BLOCK), axis=0)
    ended = first_end < first_mask
    tl.store(counts + canvas, tl.where(ended, (first_end + 1).to(tl.int64), width))
    still_open = tl.max((is_open & ~accept).to(tl.int32), axis=0)
    tl.store(finisheds + canvas, tl.where(ended, 0, still_open) == 0)
    tl.store(reasons + canvas, tl.where(last, _STEPS, _SETTLED).to(tl.int64))
