"""One denoising step over a batch of canvases. Read this first.

      hidden rows [B, L, H]
            |  head            softmax(logits / T(step)): argmax, sample, entropy, soft embedding
            v
      CanvasStats
            |  accept          the surest positions keep their sample ...
            |  renoise         ... the others become uniform noise
            |  stop            argmax unchanged and entropy low, or out of steps
            v
      Decision ---- observe    whoever wants to watch, see ``trace``
            |  canvas          the pool moves on: next input, history, self-conditioning, phase
            v
      Emission                 tokens of the canvases whose KV was committed in this forward

The rule is the published one of DiffusionGemma (entropy-bounded sampling, arXiv 2505.24857). Takes
tensors, gives tensors, never waits for the device, knows nothing of requests or of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch

from vllm_diffusion.denoise.accept import entropy_bound
from vllm_diffusion.denoise.renoise import uniform_tokens
from vllm_diffusion.denoise.schedule import linear_temperature
from vllm_diffusion.denoise.stop import stable_and_confident
from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision, Emission, Noise

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.head import Head

Rule: TypeAlias = Callable[["CanvasPool", CanvasBatch, CanvasStats], Decision]
"""What becomes of the canvases of a step; ``decide`` is one."""

Observer: TypeAlias = Callable[["CanvasPool", CanvasBatch, CanvasStats, Decision], None]
"""Sees a step decided and not yet applied; changes nothing. Rows of slots that commit are noise."""


def advance(
    pool: CanvasPool,
    batch: CanvasBatch,
    hidden: Tensor,
    head: Head,
    *,
    rule: Rule | None = None,
    observe: Observer | None = None,
) -> Emission:
    """Run the head and the rule on the canvases of one forward and move them on.

    Args:
        pool: the canvases' state, changed in place.
        batch: which slots ran, where, and how wide.
        hidden: [B, L, H], final hidden states of every canvas row (anything where not valid).
        head: turns hidden rows into statistics.
        rule: instead of ``decide``.
        observe: called between the decision and its effect on the pool.
    """
    slots, (num, length) = batch.slots, batch.position.shape
    temperature = linear_temperature(
        pool.step[slots], pool.max_steps[slots], pool.t_min[slots], pool.t_max[slots]
    )
    noise = Noise(
        seed=pool.seed[slots].repeat_interleave(length, dim=0),
        position=batch.position.flatten(),
        step=pool.step[slots].repeat_interleave(length),
    )
    stats = head(
        hidden.reshape(num * length, -1), temperature.repeat_interleave(length), noise
    ).reshape(num, length)
    decision = (rule or decide)(pool, batch, stats)
    if observe is not None:
        observe(pool, batch, stats, decision)
    return pool.apply(batch, stats, decision)


def decide(pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
    """Accept, renoise, stop: the published rule, one line each."""
    slots = batch.slots
    accept = entropy_bound(stats.entropy, pool.entropy_bound[slots], batch.valid)
    noise = uniform_tokens(pool.seed[slots], batch.position, pool.step[slots], pool.vocab_size)
    settled = stable_and_confident(
        stats.argmax,
        pool.history[slots],
        stats.entropy,
        pool.confidence_threshold[slots],
        batch.valid,
    )
    out_of_steps = pool.step[slots] + 1 >= pool.max_steps[slots]
    return Decision(
        accept=accept,
        next_tokens=torch.where(accept, stats.sample, noise),
        finished=settled | out_of_steps,
    )
