"""A look at what an engine of this process holds: requests, KV blocks, canvas slots."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from vllm_diffusion.engine.scheduler import CanvasScheduler

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm import LLM
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_diffusion.engine.model_state import CanvasModelState


class Inside:
    """Only for engines in this process: VLLM_ENABLE_V1_MULTIPROCESSING=0."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        core = llm.llm_engine.engine_core.engine_core
        self.scheduler: CanvasScheduler = core.scheduler
        self.runner: Any = core.model_executor.driver_worker.worker.model_runner

    @property
    def model_state(self) -> CanvasModelState:
        """Ours, of the one worker."""
        state: CanvasModelState = self.runner.model_state
        return state

    def running(self) -> list[str]:
        """The requests that run, by the name the client gave them."""
        return [external(request.request_id) for request in self.scheduler.running]

    def used_blocks(self) -> int:
        """KV blocks that somebody holds; the pool keeps one for itself."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    def slot_of(self, name: str) -> int:
        """The slot of a running request."""
        slots = {external(each): slot for each, slot in self.model_state._slot_of.items()}
        return slots[name]

    def assert_idle(self) -> None:
        """Nothing runs, waits, or holds memory; the worker learns of an end with the next step."""
        assert not self._llm.llm_engine.has_unfinished_requests()
        assert not self.scheduler.requests
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert self.used_blocks() == 0
        ended = self.scheduler.finished_req_ids
        assert set(self.model_state._slot_of) <= ended
        assert set(self.runner.req_states.req_id_to_index) <= ended

    @contextmanager
    def recorded_steps(self) -> Iterator[list[dict[str, int]]]:
        """Rows by request of every step scheduled inside the block."""
        steps: list[dict[str, int]] = []
        schedule = CanvasScheduler.schedule

        def spy(scheduler: CanvasScheduler, *args: Any) -> SchedulerOutput:
            scheduled = schedule(scheduler, *args)
            if scheduled.num_scheduled_tokens:
                steps.append(dict(scheduled.num_scheduled_tokens))
            return scheduled

        with patch.object(CanvasScheduler, "schedule", spy):
            yield steps


def external(request_id: str) -> str:
    """The name without the suffix that vLLM adds."""
    return request_id.rpartition("-")[0] or request_id
