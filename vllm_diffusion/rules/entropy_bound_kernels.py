"""``entropy_bound`` as Triton kernels, one program per canvas.

Imported only on a GPU, where the torch version takes hundreds of launches. ``EntropyBound`` is the
definition. Integers, masks, temperatures and noise are equal to its bit for bit. Sums over a canvas
(entropy before a position, mean entropy, doubt) are fp32 in another order, which depends only on
the canvas: they may differ from the definition's in the last bits, but never between batches. The
entropies before a position in ascending order are summed separately for each position; since they
are not negative, sums do not decrease along that order and the accepted positions are a prefix of
it here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_diffusion.denoise import philox
from vllm_diffusion.denoise.accept import DRIFT
from vllm_diffusion.denoise.rng import Purpose
from vllm_diffusion.denoise.stop import MAJORITY
from vllm_diffusion.records import Commit, Decision, Noise, StopReason
from vllm_diffusion.rules.entropy_bound import EntropyBound

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import CanvasBatch, CanvasStats

_DRIFT = tl.constexpr(DRIFT)
_MAJORITY = tl.constexpr(MAJORITY)
_SETTLED = tl.constexpr(int(StopReason.SETTLED))
_STEPS = tl.constexpr(int(StopReason.STEPS))
_RENOISE = tl.constexpr(int(Purpose.RENOISE))

_COMPARED = tl.constexpr(32)  # positions that all others are compared with per iteration


class EntropyBoundKernels(EntropyBound):
    """The rule on a GPU: two launches per step."""

    def keyed(
        self, pool: CanvasPool, batch: CanvasBatch, factor: Tensor | None = None
    ) -> tuple[Tensor, Noise]:
        """See ``Rule.keyed``."""
        return _keyed(pool, batch, factor)

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """See ``EntropyBound.decide``."""
        return _decide(pool, batch, stats)


def _keyed(pool: CanvasPool, batch: CanvasBatch, factor: Tensor | None) -> tuple[Tensor, Noise]:
    num, length = batch.position.shape
    temperature = torch.empty(num * length, device=pool.device)
    step = torch.empty(num * length, dtype=torch.int64, device=pool.device)
    seed = step.new_empty(num * length, 2)
    _key_rows[(num,)](
        batch.slots,
        temperature if factor is None else factor,
        pool.step,
        pool.constants.max_steps,
        pool.constants.t_min,
        pool.constants.t_max,
        pool.seed,
        temperature,
        seed,
        step,
        FACTOR=factor is not None,
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
        # A fused multiply-add rounds once; the definition rounds twice.
        enable_fp_fusion=False,
    )
    return temperature, Noise(seed=seed, position=batch.position.flatten(), step=step)


def _decide(pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
    num, length = batch.position.shape
    accept = torch.empty_like(batch.valid)
    finished = accept.new_empty(num)
    next_tokens, reason = torch.empty_like(batch.position), torch.empty_like(batch.slots)
    _decide_canvas[(num,)](
        batch.slots,
        batch.width,
        batch.position,
        stats.argmax.contiguous(),
        stats.sample.contiguous(),
        stats.entropy.contiguous(),
        stats.top_prob.contiguous(),
        pool.argmax,
        pool.top_prob,
        pool.history,
        pool.seed,
        pool.step,
        pool.constants.max_steps,
        pool.constants.stability_threshold,
        pool.constants.entropy_bound,
        pool.constants.confidence_threshold,
        pool.constants.hold_threshold,
        pool.constants.doubt_threshold,
        accept,
        next_tokens,
        finished,
        reason,
        VOCAB=pool.vocab_size,
        REMEMBERED=pool.history.shape[1],
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
        num_warps=8,
    )
    return Decision(
        accept=accept,
        next_tokens=next_tokens,
        finished=finished,
        reason=reason,
        commit=Commit(tokens=stats.argmax),
    )


@triton.jit
def _key_rows(  # noqa: PLR0917 - kernels take positional arguments
    slots: tl.tensor,
    factors: tl.tensor,
    steps: tl.tensor,
    limits: tl.tensor,
    t_mins: tl.tensor,
    t_maxs: tl.tensor,
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
    step = tl.load(steps + slot)
    limit = tl.load(limits + slot)
    remaining = tl.maximum(limit - step, 1).to(tl.float32)
    t_min = tl.load(t_mins + slot)
    span = (tl.load(t_maxs + slot) - t_min).to(tl.float32)
    temperature = t_min.to(tl.float32) + span * tl.div_rn(remaining, limit.to(tl.float32))
    if FACTOR:
        temperature = temperature * tl.load(factors + canvas)
    row = canvas * LENGTH + offset
    tl.store(temperatures + row, tl.zeros_like(offset).to(tl.float32) + temperature, mask=there)
    zero = tl.zeros_like(row)
    tl.store(row_steps + row, zero + step, mask=there)
    tl.store(row_seeds + 2 * row, zero + tl.load(seeds + 2 * slot), mask=there)
    tl.store(row_seeds + 2 * row + 1, zero + tl.load(seeds + 2 * slot + 1), mask=there)


@triton.jit
def _spent_before(
    entropies: tl.tensor,
    entropy: tl.tensor,
    offset: tl.tensor,
    width: tl.tensor,
    block: tl.constexpr,
) -> tl.tensor:
    """[block] fp32, nats, sum of the entropies before each position in ascending order."""
    spent = tl.zeros_like(entropy)
    for first in range(0, block, _COMPARED):
        other = first + tl.arange(0, _COMPARED)
        theirs = tl.load(entropies + other, mask=other < width, other=float("inf"))[None, :]
        before = theirs < entropy[:, None]
        before |= (theirs == entropy[:, None]) & (other[None, :] < offset[:, None])
        spent += tl.sum(tl.where(before, theirs, 0.0), axis=1)
    return spent


@triton.jit
def _decide_canvas(  # noqa: PLR0917
    slots: tl.tensor,
    widths: tl.tensor,
    positions: tl.tensor,
    argmaxes: tl.tensor,
    samples: tl.tensor,
    entropies: tl.tensor,
    top_probs: tl.tensor,
    last_argmaxes: tl.tensor,
    last_top_probs: tl.tensor,
    histories: tl.tensor,
    seeds: tl.tensor,
    steps: tl.tensor,
    limits: tl.tensor,
    stabilities: tl.tensor,
    bounds: tl.tensor,
    confidences: tl.tensor,
    holds: tl.tensor,
    doubts: tl.tensor,
    accepts: tl.tensor,
    next_tokens: tl.tensor,
    finisheds: tl.tensor,
    reasons: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
    REMEMBERED: tl.constexpr,  # noqa: N803
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    canvas = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    there = offset < LENGTH
    slot, width = tl.load(slots + canvas), tl.load(widths + canvas)
    valid = offset < width
    row = canvas * LENGTH + offset
    argmax = tl.load(argmaxes + row, mask=there, other=0)
    entropy = tl.load(entropies + row, mask=there, other=0.0)
    top_prob = tl.load(top_probs + row, mask=there, other=0.0)
    last_argmax = tl.load(last_argmaxes + slot * LENGTH + offset, mask=there, other=0)
    last_top_prob = tl.load(last_top_probs + slot * LENGTH + offset, mask=there, other=0.0)
    step = tl.load(steps + slot)

    # NaN or infinite entropy sorts last and is never accepted, nor is anything after it.
    spent = _spent_before(entropies + canvas * LENGTH, entropy, offset, width, BLOCK)
    confident = valid & (entropy < float("inf")) & (spent <= tl.load(bounds + slot))

    hold = tl.load(holds + slot)
    stable = (argmax == last_argmax) & (tl.abs(top_prob - last_top_prob) <= _DRIFT)
    stable &= last_top_prob > 0
    stable = stable & (top_prob >= tl.where(hold > 0, hold, float("inf"))) & valid

    position = tl.load(positions + row, mask=there, other=0)
    noise = philox.random_tokens(seeds + 2 * slot, position, step, _RENOISE, VOCAB)
    sample = tl.load(samples + row, mask=there, other=0)
    tl.store(accepts + row, confident | stable, mask=there)
    chosen = tl.where(confident, sample, tl.where(stable, argmax, noise))
    tl.store(next_tokens + row, chosen, mask=there)

    moved = tl.zeros_like(offset)
    stability = tl.load(stabilities + slot)
    for age in range(1, REMEMBERED + 1):
        past = histories + (slot * REMEMBERED + REMEMBERED - age) * LENGTH + offset
        differs = tl.load(past, mask=there, other=0) != argmax
        moved |= (differs & valid & (age <= stability)).to(tl.int32)
    mean = tl.div_rn(tl.sum(tl.where(valid, entropy, 0.0), axis=0), width.to(tl.float32))
    settled = (tl.max(moved, axis=0) == 0) & (mean < tl.load(confidences + slot))

    overturned = (argmax != last_argmax) & (last_top_prob > _MAJORITY) & valid
    doubt = tl.sum(tl.where(valid, 1 - top_prob, 0.0), axis=0)
    doubtless = (doubt < tl.load(doubts + slot)) & (tl.max(overturned.to(tl.int32), axis=0) == 0)
    settled |= doubtless
    tl.store(finisheds + canvas, settled | (step + 1 >= tl.load(limits + slot)))
    tl.store(reasons + canvas, tl.where(settled, _SETTLED, _STEPS).to(tl.int64))
