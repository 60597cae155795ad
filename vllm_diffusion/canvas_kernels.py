"""``CanvasPool.apply`` and ``begin`` as Triton kernels, one program per canvas.

Imported only on a GPU. ``CanvasPool`` is the definition and results are equal to its, except that
the mean entropy of a canvas is summed in another order and may differ in the last bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.denoise import philox
from vllm_diffusion.denoise.rng import Purpose
from vllm_diffusion.records import Emission

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision

_INITIAL = tl.constexpr(int(Purpose.INITIAL_CANVAS))
_COPIED: Final = 4096  # elements of the soft embedding that one program copies


class CanvasPoolKernels(CanvasPool):
    """The canvas pool on a GPU."""

    def apply(self, batch: CanvasBatch, stats: CanvasStats, decision: Decision) -> Emission:
        """See ``CanvasPool.apply``."""
        return _apply(self, batch, stats, decision)

    def begin(self, slots: Tensor, position: Tensor) -> None:
        """See ``CanvasPool.begin``."""
        _begin(self, slots, position)


def _apply(
    pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats, decision: Decision
) -> Emission:
    num, length = batch.position.shape
    commit = decision.commit
    entropy = stats.entropy.contiguous()
    emission = Emission(
        tokens=torch.empty_like(batch.position),
        count=torch.empty_like(batch.width),
        steps=torch.empty_like(batch.width),
        reason=torch.empty_like(batch.width),
        entropy=entropy.new_empty(num),
        revealed=None if pool.mask_id is None else torch.empty_like(batch.valid),
    )
    goes_on = torch.empty_like(decision.finished)
    _apply_canvas[(num,)](
        batch.slots,
        batch.width,
        batch.position,
        stats.argmax.contiguous(),
        stats.top_prob.contiguous(),
        entropy,
        None if pool.mask_id is None else decision.accept.contiguous(),
        decision.next_tokens.contiguous(),
        decision.finished.contiguous(),
        decision.reason.contiguous(),
        commit.tokens.contiguous(),
        None if commit.rows is None else commit.rows.contiguous(),
        None if commit.count is None else commit.count.contiguous(),
        pool.seed,
        pool.fused,
        pool.tokens,
        pool.argmax,
        pool.top_prob,
        pool.history,
        pool.step,
        pool.first_step,
        pool.count,
        pool.rows,
        pool.reason,
        pool.entropy,
        pool.causal,
        batch.idle,
        emission.tokens,
        emission.count,
        emission.steps,
        emission.reason,
        emission.entropy,
        emission.revealed,
        goes_on,
        VOCAB=pool.vocab_size,
        MASK=_mask_of(pool),
        REMEMBERED=pool.history.shape[1],
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
    )
    if pool.soft_embedding is not None and stats.soft_embedding is not None:
        canvas = pool.soft_embedding[0].numel()
        _store_soft_embeddings[(num, triton.cdiv(canvas, _COPIED))](
            batch.slots,
            goes_on,
            stats.soft_embedding.contiguous(),
            pool.soft_embedding,
            canvas,
            BLOCK=_COPIED,
        )
    return emission


def _begin(pool: CanvasPool, slots: Tensor, position: Tensor) -> None:
    length = position.shape[1]
    if pool.soft_embedding is not None:
        pool.soft_embedding[slots] = 0
    _begin_canvas[(len(slots),)](
        slots,
        position.contiguous(),
        pool.seed,
        pool.tokens,
        pool.top_prob,
        pool.history,
        pool.step,
        pool.first_step,
        pool.causal,
        VOCAB=pool.vocab_size,
        MASK=_mask_of(pool),
        REMEMBERED=pool.history.shape[1],
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
    )


def _mask_of(pool: CanvasPool) -> int:
    """The token of absorbing noise; -1 for uniform noise."""
    return -1 if pool.mask_id is None else pool.mask_id


@triton.jit
def _noise(
    seed: tl.tensor,
    position: tl.tensor,
    step: tl.tensor,
    vocab: tl.constexpr,
    mask: tl.constexpr,
) -> tl.tensor:
    """The tokens of a new canvas, see ``denoise.noise``."""
    if mask >= 0:
        tokens = position * 0 + mask
    else:
        tokens = philox.random_tokens(seed, position, step, _INITIAL, vocab)
    return tokens


@triton.jit
def _remember(  # noqa: PLR0917 - kernels take positional arguments
    past: tl.tensor,
    argmax: tl.tensor,
    there: tl.tensor,
    emits: tl.tensor,
    remembered: tl.constexpr,
    length: tl.constexpr,
) -> None:
    """Append a step to a slot's history, whose oldest step ``past`` points at, or clear it."""
    for _ in range(1, remembered):
        newer = tl.load(past + length, mask=there, other=0)
        tl.debug_barrier()
        tl.store(past, tl.where(emits, -1, newer), mask=there)
        past += length
    if remembered > 0:
        tl.store(past, tl.where(emits, -1, argmax), mask=there)


@triton.jit
def _apply_canvas(  # noqa: PLR0915, PLR0917 - a second kernel would cost a launch
    slots: tl.tensor,
    widths: tl.tensor,
    positions: tl.tensor,
    argmaxes: tl.tensor,
    top_probs: tl.tensor,
    entropies: tl.tensor,
    accepts: tl.tensor,
    next_tokens: tl.tensor,
    finisheds: tl.tensor,
    decided_reasons: tl.tensor,
    commit_tokens: tl.tensor,
    commit_rows: tl.tensor,
    commit_counts: tl.tensor,
    seeds: tl.tensor,
    fuseds: tl.tensor,
    pool_tokens: tl.tensor,
    pool_argmaxes: tl.tensor,
    pool_top_probs: tl.tensor,
    histories: tl.tensor,
    steps: tl.tensor,
    first_steps: tl.tensor,
    pool_counts: tl.tensor,
    pool_rows: tl.tensor,
    pool_reasons: tl.tensor,
    pool_entropies: tl.tensor,
    causals: tl.tensor,
    idles: tl.tensor,
    emitted_tokens: tl.tensor,
    emitted_counts: tl.tensor,
    emitted_steps: tl.tensor,
    emitted_reasons: tl.tensor,
    emitted_entropies: tl.tensor,
    revealeds: tl.tensor,
    go_on: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
    MASK: tl.constexpr,  # noqa: N803
    REMEMBERED: tl.constexpr,  # noqa: N803
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    canvas = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    there = offset < LENGTH
    slot, width = tl.load(slots + canvas), tl.load(widths + canvas)
    row, mine = canvas * LENGTH + offset, slot * LENGTH + offset
    committing = tl.load(causals + slot) != 0
    finished = (tl.load(finisheds + canvas) != 0) & ~committing
    fused = finished & (tl.load(fuseds + slot) != 0)
    emits = committing | fused
    waits = finished & ~fused

    argmax = tl.load(argmaxes + row, mask=there, other=0)
    argmax = tl.where(committing, tl.load(pool_argmaxes + mine, mask=there, other=0), argmax)
    tokens = tl.load(commit_tokens + row, mask=there, other=0)
    rows, count = offset.to(tl.int64), width
    if commit_rows is not None:
        rows = tl.load(commit_rows + row, mask=there, other=0)
    if commit_counts is not None:
        count = tl.load(commit_counts + canvas)
    entropy = tl.load(entropies + row, mask=offset < width, other=0.0)
    mean = tl.div_rn(tl.sum(entropy, axis=0), width.to(tl.float32))
    step, first_step = tl.load(steps + slot), tl.load(first_steps + slot)
    num_emitted = tl.where(emits, tl.where(committing, tl.load(pool_counts + slot), count), 0)
    ran = ~committing
    if idles is not None:
        idle = tl.load(idles + canvas) != 0
        num_emitted, ran = tl.where(idle, 0, num_emitted), ran & ~idle
    steps_taken = tl.where(emits, step - first_step + fused.to(tl.int64), 0)
    reason = tl.load(decided_reasons + canvas)
    emitted_reason = tl.where(committing, tl.load(pool_reasons + slot), reason)
    emitted_entropy = tl.where(committing, tl.load(pool_entropies + slot), mean)

    behind = tl.load(positions + row, mask=there, other=0) + num_emitted
    fresh = _noise(seeds + 2 * slot, behind, step * 0, VOCAB, MASK)
    next_input = tl.load(next_tokens + row, mask=there, other=0)
    next_input = tl.where(waits, tokens, tl.where(emits, fresh, next_input))
    top_prob = tl.load(top_probs + row, mask=there, other=0.0)
    emitted = tl.where(committing, tl.load(pool_tokens + mine, mask=there, other=0), tokens)

    # Another thread may write a place: all must have read it first.
    tl.debug_barrier()
    tl.store(emitted_tokens + row, emitted, mask=there)
    tl.store(emitted_counts + canvas, num_emitted)
    tl.store(emitted_steps + canvas, steps_taken)
    tl.store(emitted_reasons + canvas, emitted_reason)
    tl.store(emitted_entropies + canvas, emitted_entropy)
    tl.store(go_on + canvas, ~committing & ~finished)
    tl.store(pool_tokens + mine, next_input, mask=there)
    if MASK >= 0:  # the pool's argmax is its tokens
        accept = tl.load(accepts + row, mask=there, other=0) != 0
        tl.store(revealeds + row, accept & ran, mask=there)
    else:
        tl.store(pool_argmaxes + mine, argmax, mask=there)
    tl.store(pool_top_probs + mine, tl.where(emits, 0.0, top_prob), mask=there)
    tl.store(pool_rows + mine, rows, mask=there)
    tl.store(pool_counts + slot, count)
    tl.store(pool_reasons + slot, reason)
    tl.store(pool_entropies + slot, mean)
    tl.store(steps + slot, tl.where(emits, 0, step + 1))
    tl.store(first_steps + slot, tl.where(emits, 0, first_step))
    tl.store(causals + slot, waits)
    _remember(
        histories + slot * REMEMBERED * LENGTH + offset, argmax, there, emits, REMEMBERED, LENGTH
    )


@triton.jit
def _store_soft_embeddings(  # noqa: PLR0917
    slots: tl.tensor,
    go_on: tl.tensor,
    soft_embeddings: tl.tensor,
    pool_soft: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    canvas = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    slot = tl.load(slots + canvas)
    carried = at < tl.where(tl.load(go_on + canvas) != 0, size, 0)
    soft = tl.load(soft_embeddings + canvas * size + at, mask=carried, other=0.0)
    soft = tl.where(tl.abs(soft.to(tl.float32)) < float("inf"), soft, 0.0)
    out = pool_soft + slot * size + at
    tl.store(out, soft.to(pool_soft.dtype.element_ty), mask=there)


@triton.jit
def _begin_canvas(  # noqa: PLR0917
    slots: tl.tensor,
    positions: tl.tensor,
    seeds: tl.tensor,
    pool_tokens: tl.tensor,
    pool_top_probs: tl.tensor,
    histories: tl.tensor,
    steps: tl.tensor,
    first_steps: tl.tensor,
    causals: tl.tensor,
    VOCAB: tl.constexpr,  # noqa: N803
    MASK: tl.constexpr,  # noqa: N803
    REMEMBERED: tl.constexpr,  # noqa: N803
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    canvas = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    there = offset < LENGTH
    slot = tl.load(slots + canvas)
    mine = slot * LENGTH + offset
    position = tl.load(positions + canvas * LENGTH + offset, mask=there, other=0)
    tokens = _noise(seeds + 2 * slot, position, slot * 0, VOCAB, MASK)
    tl.store(pool_tokens + mine, tokens, mask=there)
    tl.store(pool_top_probs + mine, tl.zeros_like(offset).to(tl.float32), mask=there)
    for age in range(REMEMBERED):
        past = histories + (slot * REMEMBERED + age) * LENGTH + offset
        tl.store(past, tl.zeros_like(mine) - 1, mask=there)
    tl.store(steps + slot, 0)
    tl.store(first_steps + slot, 0)
    tl.store(causals + slot, False)
