"""DiffusionGemma's published rule: entropy-bounded sampling on uniform noise.

    temperature   falls linearly over the steps
    accept        the lowest-entropy positions keep their sample, within a bound on joint entropy
    renoise       all others become uniform noise
    stop          the argmax is stable and the mean entropy low, or the schedule has ended
    commit        the argmax

Two additions save forwards; they are off unless the constants switch them on (docs/decoding.md).
Positions with a likely argmax that is stable for a step keep it, and a canvas with little doubt may
stop without being stable.

Source: arXiv 2505.24857, and ``diffusion_gemma`` of Transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_diffusion.denoise.accept import entropy_bound, stable_argmax
from vllm_diffusion.denoise.constants import EntropyBoundConstants
from vllm_diffusion.denoise.schedule import linear_temperature
from vllm_diffusion.denoise.stop import low_doubt, stable_and_confident
from vllm_diffusion.records import CanvasBatch, CanvasStats, Commit, Decision, StopReason
from vllm_diffusion.rules.rule import Rule

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.constants import RuleConstants


class EntropyBound(Rule):
    """The definition in torch, used on CPUs."""

    def temperature(self, pool: CanvasPool, slots: Tensor) -> Tensor:
        """The ramp from ``t_max`` to ``t_min``."""
        of = pool.constants
        return linear_temperature(
            pool.step[slots], of.max_steps[slots], of.t_min[slots], of.t_max[slots]
        )

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """Accept, renoise, stop."""
        slots, of = batch.slots, pool.constants
        last = pool.argmax[slots], pool.top_prob[slots]
        confident = entropy_bound(stats.entropy, of.entropy_bound[slots], batch.valid)
        stable = stable_argmax(
            stats.argmax, stats.top_prob, *last, of.hold_threshold[slots], batch.valid
        )
        noise = self.noise.renoise(pool.seed[slots], batch.position, pool.step[slots])
        settled = stable_and_confident(
            stats.argmax,
            pool.history[slots],
            stats.entropy,
            of.confidence_threshold[slots],
            batch.valid,
            of.stability_threshold[slots],
        ) | low_doubt(
            stats.argmax,
            stats.top_prob,
            *last,
            of.doubt_threshold[slots],
            batch.valid,
        )
        return Decision(
            accept=confident | stable,
            next_tokens=torch.where(
                confident, stats.sample, torch.where(stable, stats.argmax, noise)
            ),
            finished=settled | pool.out_of_steps(slots),
            reason=torch.where(settled, StopReason.SETTLED, StopReason.STEPS),
            commit=Commit(tokens=stats.argmax),
        )

    def soft_embeddings(self, pool: CanvasPool, slots: Tensor) -> tuple[Tensor | None, bool]:
        """As many ids as each request asks for; none in the last step of a canvas's schedule.

        No step follows that one. Which canvases are in it is known on the device, so it is used
        only on a CPU, where the test needs no device sync.
        """
        owners = [_limited(constants) for constants in pool.owners.values()]
        top_k = pool.constants.soft_embedding_top_k[slots] if any(owners) else None
        if slots.device.type == "cpu" and (last := pool.out_of_steps(slots)).any():
            top_k = torch.where(last, -1, 0 if top_k is None else top_k)
        return top_k, bool(owners) and all(owners)


def _limited(constants: RuleConstants) -> bool:
    assert isinstance(constants, EntropyBoundConstants)
    return constants.soft_embedding_top_k > 0
