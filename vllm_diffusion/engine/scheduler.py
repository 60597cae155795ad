"""vLLM's diffusion schedulers, made to run a canvas in one piece or not at all.

The stock running loop clips a request's rows to what is left of the step's token budget. For a
prompt that is chunked prefill; for a canvas it would change its width in the middle of its life.
Here a canvas that does not fit waits a step. Everything else is vLLM's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.diffusion_scheduler import (
    DiffusionAsyncScheduler,
    DiffusionScheduler,
    diffusion_canvas_width,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request


class WholeCanvasMixin:
    """Holds back, for one step, the canvases that would be cut."""

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step in which every canvas runs at its full width."""
        self._hold_cut_canvases()
        return super().schedule(throttle_prefills)  # type: ignore[misc]

    def _hold_cut_canvases(self: Any) -> None:
        # The running loop serves requests in this order and takes what fits, so walking the same
        # order with the same arithmetic tells who would be cut.
        budget = self.max_num_scheduled_tokens
        for request in self.running:
            if request.num_computed_tokens - request.num_output_placeholders < request.num_tokens:
                budget -= min(budget, request.num_tokens - request.num_computed_tokens)
                continue
            width = self._canvas_rows(request)
            if width > budget or self._width_unsettled(request):
                # schedule() advances current_step before it compares, so + 2 skips this call alone;
                # max keeps a longer wait that pipeline parallelism may have set.
                request.next_decode_eligible_step = max(
                    request.next_decode_eligible_step, self.current_step + 2
                )
            else:
                budget -= width

    def _canvas_rows(self: Any, request: Request) -> int:
        """Rows the request's canvas takes in a step; fewer than its width only at max_model_len."""
        committed = request.num_computed_tokens - request.num_output_placeholders
        width = diffusion_canvas_width(request, self.num_spec_tokens)
        return min(width, self.max_model_len - committed)

    def _width_unsettled(self: Any, request: Request) -> bool:
        """True while a step in flight leaves open where a canvas near max_model_len starts.

        Asynchronous scheduling counts a running canvas as computed until its result is known, and
        clips the next step at max_model_len by that count: the width would alternate from step to
        step. Such a request runs synchronously: it waits until nothing of it is in flight.
        """
        in_flight = request.num_output_placeholders
        return bool(
            in_flight and request.num_computed_tokens + self.num_spec_tokens > self.max_model_len
        )


class CanvasScheduler(WholeCanvasMixin, DiffusionScheduler):
    """For synchronous scheduling."""


class AsyncCanvasScheduler(WholeCanvasMixin, DiffusionAsyncScheduler):
    """For asynchronous scheduling."""


def canvas_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """Build the scheduler the config asks for; vLLM resolves this function by name.

    A function, because whether scheduling is asynchronous is decided after the name is set.
    """
    asynchronous = vllm_config.scheduler_config.async_scheduling
    scheduler = AsyncCanvasScheduler if asynchronous else CanvasScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
