"""Fused commits: the commit rows of a finished canvas share a forward with its successor.

    separate       ... last step | commit: tokens leave | first step of the next canvas ...
    fused          ... last step: tokens leave | commit and first step of the next canvas ...
    fused, unseen  ... last step: tokens leave | commit | first step of the next canvas ...

The tokens are the same; a canvas costs a forward less, and the last one of a request is not
committed at all, since nobody will look at it. Scheduler and worker both account for it, so both
ask here, and get the same answer.

Asynchronous scheduling grants the rows of a step before the last one's outcome is known. A canvas
of w rows begins at P, a step of it is in flight, and the rows of the next are granted:

    granted                 the canvas finished             it did not
    w rows                  commit, no canvas               canvas
    2 w rows                commit | next canvas            canvas | padding

Which it is only the device knows, by the slot: ``CanvasPool.causal`` says of a fused slot that its
last canvas has given its tokens and is not committed; the next one has begun. So a step needs no
word from the scheduler, and a grant that was wrong costs what it costs: w rows of padding, or a
commit in a forward of its own. w + w rows are granted where the canvas in flight takes the last
step that it may: known from the step before, whose result is there. Of a canvas that may settle
earlier it is not known; guessing it did not pay, see docs/limits.md. A commit of a part of a canvas
always goes alone where it was not foreseen, because the next canvas's rows stand where a whole one
would end.

What the scheduler counts, per request, with T tokens known, computed rows C and placeholders H for
rows in flight that may be refused, so that C - H rows are computed for certain:

    canvas granted          C += w    H += w       vLLM's own
    both granted            C += 2w   H += 2w      w added to H before vLLM schedules, which then
                                                   finds w rows of drafts and w in front of them
    canvas goes on          C -= w    H -= w       vLLM's own: no token came, all drafts refused
    c tokens left           T += c    H -= c       vLLM's own, which takes them for computed;
                            C -= c                 they are not, but in the next step in flight:
                            H -= c                 c of its rows count, and its drafts, refused
                                                   when its result comes, are c fewer
    none in flight          C - H = T - c          vLLM grants c rows of text and a canvas: the
                                                   synchronous form, which is this one with no step
                                                   in flight

The worker counts the same: a canvas's rows are all refused, also in the step that gives its tokens,
and of the rows that commit it c count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vllm_diffusion.config import fused_commit

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput

SCHEDULER: Final = "vllm_diffusion.engine.scheduler.canvas_scheduler"
"""The scheduler that accounts for fused commits; another one would lose tokens."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """What an engine does with the commits of its requests."""

    why_not: str | None
    """Why no commit can be fused; None if it can."""
    served: bool
    """Whether those of a request that does not say are to be."""
    foreseen: bool = False
    """Rows are granted before it is known what they are: asynchronous scheduling."""

    @staticmethod
    def of(vllm_config: VllmConfig) -> Fusion:
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
        )

    def holds_for(self, asked: bool | None) -> bool:
        """Whether the commits of a request are fused.

        Args:
            asked: what it says; None if it does not.
        """
        return self.why_not is None and bool(self.served if asked is None else asked)


@dataclass(slots=True, eq=False)
class StepInFlight:
    """A step that was granted and whose result has not come, as the scheduler counts it."""

    scheduled: SchedulerOutput
    drafts: dict[str, int]
    """Of requests whose commits are fused: rows that are refused unless tokens come."""
    guessed: dict[str, int]
    """Rows in front of a canvas, granted in case the canvas before it has finished."""
    alone: set[str]
    """Requests whose rows do nothing but commit."""

    def commits(self, req_id: str, count: int) -> None:
        """Take in that so many of a request's rows are commit rows, and count."""
        self.drafts[req_id] -= count
        if self.guessed.get(req_id) != count:
            self.alone.add(req_id)
