"""Fused commits: the commit rows of a finished canvas share a forward with its successor.

    separate       ... last step | commit: tokens leave | first step of the next canvas ...
    fused          ... last step: tokens leave | commit and first step of the next canvas ...
    fused, unseen  ... last step: tokens leave | commit | first step of the next canvas ...

The tokens are the same. A canvas costs one forward less, and the last canvas of a request is never
committed, since nothing will attend to it. Scheduler and worker must account for this in the same
way, so both ask this module.

Asynchronous scheduling grants the rows of a step before the outcome of the previous step is known.
A canvas of w rows begins at P, a step of it is in flight, and the rows of the next are granted:

    granted                 the canvas finished             it did not
    w rows                  commit, no canvas               canvas
    2 w rows                commit | next canvas            canvas | padding

Only the device knows which case holds: in a fused slot ``CanvasPool.causal`` means that the last
canvas has emitted its tokens but is not committed, and that the next canvas has begun. A step thus
needs nothing from the scheduler, and a wrong grant costs only w rows of padding or a forward for
the commit alone. 2 w rows are granted if the canvas in flight is in the last step of its schedule,
which is known from the result of the step before. Whether a canvas settles earlier is unknown, and
guessing did not pay, see docs/limits.md. A commit of part of a canvas that was not foreseen always
runs alone, because the next canvas's rows were placed where a whole canvas would end.

What the scheduler counts per request: T tokens known, C computed rows, and H placeholders for rows
in flight that may be rejected, so that C - H rows are certainly computed:

    canvas granted          C += w    H += w       vLLM's own
    both granted            C += 2w   H += 2w      w added to H before vLLM schedules, which then
                                                   finds w rows of drafts and w in front of them
    canvas continues        C -= w    H -= w       vLLM's own: no tokens, all drafts rejected
    c tokens emitted        T += c    H -= c       vLLM's own, which counts them as computed;
                            C -= c                 they are not yet. If a next step is in flight,
                            H -= c                 c of its rows count as computed and it has c
                                                   fewer drafts to reject
    none in flight          C - H = T - c          vLLM grants c rows of text and a canvas: the
                                                   synchronous form, which is this one with no step
                                                   in flight

The worker counts the same: all rows of a canvas are rejected, also in the step that emits its
tokens, and c of the rows that commit it count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vllm_diffusion.config import fused_commit
from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_diffusion.family import Family

SCHEDULER: Final = "vllm_diffusion.engine.scheduler.canvas_scheduler"
"""The scheduler that accounts for fused commits; with any other, tokens would be lost."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """How an engine commits canvases."""

    why_not: str | None
    """Why commits cannot be fused; None if they can."""
    served: bool
    """Whether to fuse commits of requests that do not set it."""
    foreseen: bool = False
    """Asynchronous scheduling: rows are granted before the previous step's outcome is known."""
    always: bool = False
    """Nothing is ever committed, because all text runs in every step."""

    @staticmethod
    def of(vllm_config: VllmConfig, family: Family) -> Fusion:
        """Read it from an engine's config, complete as scheduler and worker see it."""
        scheduler, additional = vllm_config.scheduler_config, vllm_config.additional_config
        why_not = None
        if scheduler.scheduler_cls != SCHEDULER:
            why_not = f"scheduler_cls is {scheduler.scheduler_cls}"
        options = additional.get("diffusion") if isinstance(additional, dict) else None
        return Fusion(
            why_not=why_not,
            served=fused_commit(options),
            foreseen=bool(scheduler.async_scheduling),
            always=family.text is Text.WHOLE,
        )

    def holds_for(self, asked: bool | None) -> bool:
        """Whether the commits of a request are fused.

        Args:
            asked: what it says; None if it does not.
        """
        fused = self.always or bool(self.served if asked is None else asked)
        return self.why_not is None and fused


@dataclass(slots=True, eq=False)
class StepInFlight:
    """A scheduled step whose result has not arrived."""

    scheduled: SchedulerOutput
    drafts: dict[str, int]
    """For requests with fused commits: rows that are rejected unless tokens are emitted."""
    guessed: dict[str, int]
    """Rows before a canvas, granted in case the previous canvas has finished."""
    alone: set[str]
    """Requests whose rows only commit a canvas."""

    def commits(self, req_id: str, count: int) -> None:
        """Mark so many of a request's rows as commit rows, which count as computed."""
        self.drafts[req_id] -= count
        if self.guessed.get(req_id) != count:
            self.alone.add(req_id)
