"""Run a rule on a recorded trace: the rule, pool and records of a live engine, without a model.

A rule decides the model's next input, so the recorded statistics apply only as long as the rule
decides as recorded. Each canvas reports how far that was, and each is replayed independently: after
a canvas that would have committed other tokens, the recording belongs to another text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_diffusion.canvas import pool_class
from vllm_diffusion.constrain.pins import by_position
from vllm_diffusion.denoise.constants import RevealConstants
from vllm_diffusion.denoise.noise import noise_of
from vllm_diffusion.errors import TraceError
from vllm_diffusion.records import CanvasBatch, CanvasStats
from vllm_diffusion.rules import rule_for
from vllm_diffusion.trace.file import checksum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.rules.rule import Rule
    from vllm_diffusion.trace.file import Canvas, Step, Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayedCanvas:
    """The replay of one recorded canvas of width W, in n denoising steps."""

    recorded: Canvas
    accepted: NDArray[np.bool_]  # [n, W]
    next_tokens: NDArray[np.int32]  # [n, W], of the decision
    tokens: NDArray[np.int32] | None  # [W], committed; None if the recording ended first
    diverged: int | None
    """The first step at which the accepted positions differ from the recording."""
    on_trajectory: bool
    """Every input equals the recorded one, so a live run would have ended the same way."""

    @property
    def steps(self) -> int:
        """Denoising steps until the rule stopped, or until the recording ended."""
        return len(self.accepted)

    @property
    def censored(self) -> bool:
        """Whether the recording ended before the rule stopped."""
        return self.tokens is None

    @property
    def same_tokens(self) -> bool | None:
        """Whether the committed tokens are the recorded ones; None if either has none."""
        if self.tokens is None or self.recorded.tokens is None:
            return None
        return np.array_equal(self.tokens, self.recorded.tokens)

    @property
    def reproduced(self) -> bool:
        """Whether inputs, accepted positions, stop and committed tokens equal the recorded ones."""
        return (
            self.on_trajectory
            and self.diverged is None
            and self.steps == len(self.recorded.steps)
            and self.censored != self.recorded.finished
            and self.same_tokens is not False
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """The replay of a trace."""

    canvases: tuple[ReplayedCanvas, ...]

    @property
    def steps(self) -> int:
        """Denoising forwards of the rule, without those for commits.

        A lower bound if canvases are censored, which count up to the end of their recording.
        """
        return sum(canvas.steps for canvas in self.canvases)

    @property
    def recorded_steps(self) -> int:
        """Denoising forwards of the recording."""
        return sum(len(canvas.recorded.steps) for canvas in self.canvases)

    @property
    def reproduced(self) -> bool:
        """Whether nothing differs from the recording; always true for the recorded rule."""
        return all(canvas.reproduced for canvas in self.canvases)


def replay(trace: Trace, rule: Rule | None = None, *, device: str = "cpu") -> Replay:
    """Run a rule on a trace.

    Fused commits make no difference: the canvases are the same.

    For other constants of the rule: ``replay(dataclasses.replace(trace, rule=constants))``.
    Temperatures were applied before the statistics were recorded, so changing them has no effect. A
    canvas of a guarded trace never stops before the recording.

    Args:
        trace: the recording.
        rule: replaces the recorded one; its pool has one slot.
        device: where to run. Sums equal those of the recording bit for bit only on a device of the
            same kind.

    Raises:
        TraceError: the rule ranks by a probability that was not recorded.
    """
    where = torch.device(device)
    _refuse_unknown_score(trace)
    pool = pool_class(where.type)(
        num_slots=1,
        canvas_length=trace.canvas_length,
        hidden_size=None,
        vocab_size=trace.vocab_size,
        constants=trace.rule,
        noise=noise_of(trace.family.mask_id, trace.vocab_size),
        dtype=torch.float32,
        device=where,
    )
    pool.admit(0, seed=trace.seed, ends=trace.ends)
    rule = rule or rule_for(trace.family, pool.noise, device_type=where.type)
    return Replay(
        canvases=tuple(_replay_canvas(pool, trace, canvas, rule) for canvas in trace.canvases)
    )


def _refuse_unknown_score(trace: Trace) -> None:
    """Of the probabilities that ``reveal`` ranks by, a trace has the one its rule asked for."""
    rule = trace.rule
    if not isinstance(rule, RevealConstants) or rule.reveal_by == trace.scored_by:
        return
    if rule.reveal_by in {"drawn", "model"}:
        raise TraceError(
            f"The trace cannot be replayed by {rule.reveal_by}: it was recorded by "
            f"{trace.scored_by}. Record it again with diffusion_reveal_by={rule.reveal_by}."
        )


def _replay_canvas(pool: CanvasPool, trace: Trace, canvas: Canvas, rule: Rule) -> ReplayedCanvas:
    width = canvas.width
    batch = _batch(pool, canvas)
    pool.begin(batch.slots, batch.position)
    if trace.seed_canvas:
        given = torch.tensor([trace.seed_canvas], device=pool.device)
        seed = by_position(given, batch.slots.new_tensor([trace.prompt_length]), batch.position)
        pool.tokens[batch.slots] = torch.where(seed >= 0, seed, pool.tokens[batch.slots])
    pool.step[batch.slots] = canvas.steps[0].step
    accepted, next_tokens = [], []
    diverged, on_trajectory, tokens = None, True, None
    for step in canvas.steps:
        on_trajectory &= _input_crc(pool, width) == step.input_crc
        stats = _stats(pool, step, trace.scored_by)
        decision = rule.decide(pool, batch, stats)
        if trace.guarded and not step.finished:
            # A bad word or the parser prevented the stop, which the statistics do not show.
            decision = replace(decision, finished=torch.zeros_like(decision.finished))
        pool.apply(batch, stats, decision)
        accepted.append(decision.accept[0, :width].numpy(force=True))
        next_tokens.append(decision.next_tokens[0, :width].int().numpy(force=True))
        if diverged is None and not np.array_equal(accepted[-1], step.accepted):
            diverged = step.step
        if pool.causal[0]:
            # A commit ignores statistics and decision.
            emission = pool.apply(batch, stats, decision)
            tokens = emission.tokens[0, :width].int().numpy(force=True)
            break
    return ReplayedCanvas(
        recorded=canvas,
        accepted=np.stack(accepted),
        next_tokens=np.stack(next_tokens),
        tokens=tokens,
        diverged=diverged,
        on_trajectory=bool(on_trajectory),
    )


def _batch(pool: CanvasPool, canvas: Canvas) -> CanvasBatch:
    """The canvas as in the live pool: padded to L, which determines the order of sums."""
    offset = torch.arange(pool.canvas_length, device=pool.device)
    return CanvasBatch(
        slots=torch.tensor([0], device=pool.device),
        width=torch.tensor([canvas.width], device=pool.device),
        position=(canvas.start + offset)[None],
        valid=(offset < canvas.width)[None],
    )


def _stats(pool: CanvasPool, step: Step, scored_by: str | None) -> CanvasStats:
    def padded(values: NDArray[np.int32] | NDArray[np.float32], dtype: torch.dtype) -> torch.Tensor:
        row = torch.zeros(1, pool.canvas_length, dtype=dtype)
        row[0, : step.width] = torch.from_numpy(values)
        return row.to(pool.device)

    score = None if step.score is None else padded(step.score, torch.float32)
    return CanvasStats(
        argmax=padded(step.argmax, torch.int64),
        sample=padded(step.sample, torch.int64),
        entropy=padded(step.entropy, torch.float32),
        top_prob=padded(step.top_prob, torch.float32),
        margin=padded(step.margin, torch.float32),
        soft_embedding=None,
        sample_prob=score if scored_by == "drawn" else None,
        own_prob=score if scored_by == "model" else None,
    )


def _input_crc(pool: CanvasPool, width: int) -> int:
    return checksum(pool.tokens[0, :width].int().numpy(force=True))
