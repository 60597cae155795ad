"""vLLM's diffusion schedulers, changed to run each canvas whole or not at all.

The stock running loop clips a request's rows to the rest of the step's token budget. For a prompt
that is chunked prefill; for a canvas it would change the width while it is being denoised. Here a
canvas that does not fit waits one step. If a finished canvas is to be committed beside its
successor and only the commit rows fit, those run alone.

The stock scheduler counts emitted tokens as computed. With a fused commit they are not yet: they
are subtracted from the count, and vLLM's own arithmetic then schedules them and a canvas after
them. If a step in flight already has rows for them, those are no longer drafts, see
``engine.fusion``.

The stock scheduler also assumes that a prompt's last step emits a token, with which the prompt's
log-probabilities leave, and stops the engine otherwise. A canvas emits its tokens many steps later;
until then the log-probabilities are kept here.

vLLM compiles, awaits and checks constraints, with our backend. It makes no token masks of them and
truncates no canvas to what a left-to-right matcher accepts: the automaton goes to the worker with
its request, see ``engine.constraints.backend``. Everything else is vLLM's.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from vllm.v1.core.sched.diffusion_scheduler import (
    DiffusionAsyncScheduler,
    DiffusionScheduler,
    diffusion_canvas_width,
)
from vllm.v1.request import RequestStatus

from vllm_diffusion import grid
from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.constraints.backend import ConstraintBackend, ConstraintGrammar
from vllm_diffusion.engine.constraints.thinking import thinking_of
from vllm_diffusion.engine.fusion import Fusion, StepInFlight
from vllm_diffusion.engine.telemetry import StepMeter
from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request

    from vllm_diffusion.request.admitted import Admitted

logger = logging.getLogger(f"vllm.{__name__}")

# Fields of vLLM's ModelRunnerOutput with results about prompts, by request id.
_ABOUT_PROMPTS: Final = ("prompt_logprobs_dict", "prompt_token_id_logprobs_dict")


class WholeCanvasMixin:
    """Defers canvases that would be clipped, and keeps prompt results until tokens are emitted.

    Also counts the forwards of every canvas, see ``engine.telemetry``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._delayed: dict[str, dict[str, Any]] = {name: {} for name in _ABOUT_PROMPTS}
        self._meter = StepMeter()
        self._admitted: WeakKeyDictionary[Request, Admitted] = WeakKeyDictionary()
        self._commit_alone: set[str] = set()
        self._guesses: dict[str, int] = {}
        self._in_flight: deque[StepInFlight] = deque()
        self._taken: dict[str, int] = {}
        hf_config = self.vllm_config.model_config.hf_config  # type: ignore[attr-defined]
        served = carriers.served(hf_config)
        self._family, self._rules = served.family, served.rules
        self._canvas_length = served.canvas_length
        self._fusion = Fusion.of(self.vllm_config, self._family)  # type: ignore[attr-defined]
        self._compile_for_canvases()

    def add_request(self, request: Request) -> None:
        """Take in a request, and what it asks for beside its sampling parameters."""
        if (sampling := request.sampling_params) is not None:
            if unread := carriers.unread_options(sampling):
                logger.error(
                    "Request %s entered the engine past its front end: %s are ignored.",
                    request.request_id,
                    ", ".join(unread),
                )
            self._admitted[request] = carriers.admitted(sampling, self._rules.default)
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule a step in which every canvas runs at its full width."""
        self._defer_clipped_canvases()
        scheduled: SchedulerOutput = super().schedule(throttle_prefills)  # type: ignore[misc]
        self._record_in_flight(scheduled)
        # With these set, vLLM would mask positions, wait for tokens and copy canvases to the host.
        scheduled.has_structured_output_requests = False
        scheduled.pending_structured_output_tokens = False
        self._send_automata(scheduled)
        return scheduled

    def update_draft_token_ids(self: Any, draft_token_ids: DraftTokenIds) -> None:
        """Record the canvases that continue, each at its full width; vLLM knows one width."""
        super().update_draft_token_ids(draft_token_ids)  # type: ignore[misc]
        ids = zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True)
        for req_id, tokens in ids:
            request = self.requests.get(req_id)
            if request is None or request.is_prefill_chunk or request.is_finished():
                continue
            if self._family.text is not Text.CAUSAL:
                # The worker has the tokens; only their number is read.
                request.spec_token_ids = [0] * self._canvas_rows(request, request.num_tokens)
            elif request.use_structured_output:
                request.spec_token_ids = tokens

    def update_from_output(
        self: Any, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Process a step's result; results about a prompt leave with its first tokens."""
        for name in _ABOUT_PROMPTS:
            self._delay_until_tokens(name, model_runner_output)
        committing = self._account(scheduler_output, model_runner_output)
        known = {
            req_id: self.requests[req_id].num_tokens
            for req_id in scheduler_output.num_scheduled_tokens
            if req_id in self.requests
        }
        committed = self._meter.take(
            scheduler_output,
            model_runner_output,
            self.requests,
            self._admitted,
            committing=committing,
            everybody=self.log_stats,
        )
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        if self._family.text is not Text.CAUSAL:
            self._keep(scheduler_output, model_runner_output, known)
        self._meter.send(outputs, committed, self.requests)
        return outputs

    def _keep(
        self: Any, scheduled: SchedulerOutput, output: ModelRunnerOutput, known: dict[str, int]
    ) -> None:
        """Count as computed what ``grid`` says, as the worker does.

        Args:
            scheduled: the step.
            output: its result, which vLLM has taken in.
            known: tokens of its requests before that.
        """
        emitted = dict(zip(output.req_ids, output.sampled_token_ids or (), strict=False))
        for req_id, before in known.items():
            if (request := self.requests.get(req_id)) is None:
                continue
            if req_id not in scheduled.scheduled_spec_decode_tokens:
                upto = request.num_computed_tokens
                kept = grid.kept_of_text(self._family, upto=upto, known=before)
            elif (tokens := emitted.get(req_id)) and not self._fuses(request):
                kept = grid.kept_of_commit(self._family, known=before, count=len(tokens))
            else:
                reused = not tokens and self._admitted[request].approximate_prefix
                kept = grid.kept_of_canvas(self._family, known=before, reused=reused)
            request.num_computed_tokens = kept

    def _account(self: Any, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> set[str]:
        """Subtract tokens emitted before their commit; return the requests that only committed."""
        done = next((step for step in self._in_flight if step.scheduled is scheduled), None)
        if done is None:  # nothing was scheduled
            return set()
        self._in_flight.remove(done)
        canvases = scheduled.scheduled_spec_decode_tokens
        for req_id, drafts in done.drafts.items():
            # Rows before a canvas are rejected here, since vLLM only knows of canvas rows.
            padding = drafts - len(canvases[req_id])
            request = self.requests.get(req_id)
            if padding > 0 and request is not None and not request.num_stale_output_tokens:
                request.num_computed_tokens -= padding
                request.num_output_placeholders -= padding
            canvases[req_id] = canvases[req_id][:drafts]
            if not drafts:
                del canvases[req_id]
        for req_id, tokens in zip(output.req_ids, output.sampled_token_ids or (), strict=False):
            if (request := self.requests.get(req_id)) is None or not tokens:
                continue
            if not self._fuses(request):
                done.alone.add(req_id)
            elif self._family.text is Text.CAUSAL and not request.num_stale_output_tokens:
                # Nothing of a preempted request counts as computed.
                known = request.num_tokens
                kept = grid.kept_of_canvas(self._family, known=known)
                request.num_computed_tokens -= known + len(tokens) - kept
                if (step := self._next_in_flight(req_id)) is not None:
                    step.commits(req_id, len(tokens))
                    request.num_output_placeholders -= len(tokens)
        if self._fusion.foreseen:
            self._count(done, output)
        return done.alone

    def _count(self: Any, done: StepInFlight, output: ModelRunnerOutput) -> None:
        """Count the steps of each canvas whose results have arrived."""
        taken = {}
        for req_id, tokens in zip(output.req_ids, output.sampled_token_ids or (), strict=False):
            request = self.requests.get(req_id)
            # A preempted request begins its canvas again.
            if request is None or request.num_stale_output_tokens or req_id not in done.drafts:
                continue
            begins = tokens or req_id in done.alone
            taken[req_id] = 0 if begins else self._taken.get(req_id, 0) + 1
        self._taken = taken

    def _next_in_flight(self, req_id: str) -> StepInFlight | None:
        steps = (step for step in self._in_flight if req_id in step.scheduled.num_scheduled_tokens)
        return next(steps, None)

    def _record_in_flight(self: Any, scheduled: SchedulerOutput) -> None:
        """Record what the rows of a step were granted for."""
        ran = scheduled.num_scheduled_tokens
        for req_id in self._guesses.keys() - ran.keys():
            rows, request = self._guesses.pop(req_id), self.requests[req_id]
            if request.status == RequestStatus.RUNNING:
                request.num_output_placeholders -= rows
        if ran:
            drafts = {
                req_id: len(canvas) + self._guesses.get(req_id, 0)
                for req_id, canvas in scheduled.scheduled_spec_decode_tokens.items()
                if self._fuses(self.requests[req_id])
            }
            alone = self._commit_alone & ran.keys()
            self._in_flight.append(StepInFlight(scheduled, drafts, {**self._guesses}, alone))

    def _fuses(self, request: Request) -> bool:
        admitted = self._admitted.get(request)
        return admitted is not None and self._fusion.holds_for(admitted.fused_commit)

    def _uncommitted(self, request: Request) -> int:
        """Number of known tokens that run in front of the request's canvas, if that runs next."""
        if request.is_prefill_chunk:
            return 0
        if self._family.text is Text.CAUSAL:
            prompt = request.num_computed_tokens < request.num_prompt_tokens
            if prompt or not self._fuses(request):
                return 0
        elif not request.spec_token_ids:
            return 0
        computed = request.num_computed_tokens - request.num_output_placeholders
        return grid.text_rows(self._family, known=request.num_tokens, computed=computed)

    def _in_last_step(self, request: Request) -> bool:
        """Whether the canvas in flight is in its schedule's last step (asynchronous scheduling)."""
        req_id = request.request_id
        steps = [step for step in self._in_flight if req_id in step.scheduled.num_scheduled_tokens]
        if not self._fusion.foreseen or len(steps) != 1 or req_id in steps[0].alone:
            return False
        if not steps[0].drafts.get(req_id):
            return False
        # A canvas begun from a draft takes fewer steps, but only the worker knows how many.
        return self._taken.get(req_id, 0) + 1 >= self._admitted[request].rule.max_steps

    def _is_last(self: Any, request: Request, width: int) -> bool:
        """Whether the request needs no further canvas after one of this width."""
        end = request.num_prompt_tokens + request.max_tokens
        return bool(request.num_tokens + width >= min(end, self.max_model_len))

    def _has_room(self: Any, request: Request, width: int) -> bool:
        """Whether a next canvas fits beside this commit without taking blocks others may need."""
        if self._is_last(request, width):
            return False
        length, groups = self.num_spec_tokens, len(self.kv_cache_config.kv_cache_groups)
        blocks = groups * -(-2 * length // self.block_size) * len(self.running)
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return bool(
            free >= blocks and request.num_computed_tokens + 2 * length <= self.max_model_len
        )

    def _delay_until_tokens(self: Any, name: str, output: ModelRunnerOutput) -> None:
        delayed = self._delayed[name]
        delayed |= {
            req_id: each for req_id, each in getattr(output, name).items() if each is not None
        }
        if not delayed:
            return
        leaving = {}
        for req_id, tokens in zip(output.req_ids, output.sampled_token_ids or (), strict=False):
            if tokens and req_id in delayed:
                leaving[req_id] = delayed.pop(req_id)
        setattr(output, name, leaving)
        for req_id in delayed.keys() - self.requests.keys():
            del delayed[req_id]

    def _compile_for_canvases(self: Any) -> None:
        manager, model = self.structured_output_manager, self.vllm_config.model_config
        if not model.skip_tokenizer_init:
            # vLLM creates its own backend only if none is set.
            manager.backend = ConstraintBackend(
                self.vllm_config, tokenizer=manager.tokenizer, vocab_size=model.get_vocab_size()
            )

    def _send_automata(self: Any, scheduled: SchedulerOutput) -> None:
        """Attach automata to requests that are new to the worker, or return after preemption."""
        for new in scheduled.scheduled_new_reqs:
            asked = self.requests[new.req_id].structured_output_request
            if asked is not None and isinstance(asked.grammar, ConstraintGrammar):
                thinking = thinking_of(self.structured_output_manager, self.requests[new.req_id])
                allowed = new.sampling_params.allowed_token_ids
                named = asked.grammar.for_worker(thinking, allowed)
                carriers.put_named_constraint(new, named)

    def _defer_clipped_canvases(self: Any) -> None:
        # The running loop serves requests in this order and grants what fits, so the same walk with
        # the same arithmetic finds the canvases that would be clipped.
        budget = self.max_num_scheduled_tokens
        self._commit_alone.clear()
        self._guesses.clear()
        for request in self.running:
            computed = request.num_computed_tokens - request.num_output_placeholders
            ahead = self._uncommitted(request)
            if computed + ahead < request.num_tokens:
                budget -= min(budget, request.num_tokens - request.num_computed_tokens)
                continue
            width = self._canvas_rows(request, computed + ahead)
            in_last_step = self._in_last_step(request)
            both = ahead + width <= budget and request.spec_token_ids
            kept = grid.kept_of_text(self._family, upto=computed + ahead, known=computed + ahead)
            if kept > computed and ahead <= budget and not both:
                # No canvas rows in this step, nor in a later one if this one skips the request.
                request.spec_token_ids = []
                self._commit_alone.add(request.request_id)
                width = 0
            elif in_last_step and 2 * width <= budget and self._has_room(request, width):
                # Whether these rows will count as computed is unknown too.
                request.num_output_placeholders += width
                self._guesses[request.request_id] = ahead = width
            last = in_last_step and self._is_last(request, width)
            if ahead + width > budget or last or self._width_unsettled(request):
                # schedule() advances current_step before it compares, so + 2 skips this call alone;
                # max keeps a longer wait that pipeline parallelism may have set.
                request.next_decode_eligible_step = max(
                    request.next_decode_eligible_step, self.current_step + 2
                )
            else:
                budget -= ahead + width

    def _canvas_rows(self: Any, request: Request, start: int) -> int:
        """Rows of the request's canvas, and of its horizon."""
        _, rows = grid.drafted_rows(
            self._family,
            known=start,
            asked=diffusion_canvas_width(request, self._canvas_length),
            end=self.max_model_len,
            answer_end=request.num_prompt_tokens
            + self._admitted[request].answer_rows(request.max_tokens),
        )
        return rows

    def _width_unsettled(self: Any, request: Request) -> bool:
        """Whether the start of a canvas near max_model_len depends on a step in flight.

        Asynchronous scheduling counts a running canvas as computed until its result arrives, and
        clips the next step at max_model_len by that count, so the width would alternate from step
        to step. Such a request runs synchronously: it waits until none of its steps is in flight.
        """
        in_flight = request.num_output_placeholders
        return bool(
            in_flight and request.num_computed_tokens + self.num_spec_tokens > self.max_model_len
        )


class CanvasScheduler(WholeCanvasMixin, DiffusionScheduler):
    """The scheduler for synchronous scheduling."""


class AsyncCanvasScheduler(WholeCanvasMixin, DiffusionAsyncScheduler):
    """The scheduler for asynchronous scheduling."""


def canvas_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """Build the scheduler for a config; vLLM resolves this function by name.

    It is a function because vLLM decides on asynchronous scheduling after the name is set.
    """
    family = carriers.served(vllm_config.model_config.hf_config).family
    if (why_not := Fusion.of(vllm_config, family).why_not) is not None:
        logger.info("Commits are not fused, each takes a forward of its own: %s.", why_not)
    asynchronous = vllm_config.scheduler_config.async_scheduling
    scheduler = AsyncCanvasScheduler if asynchronous else CanvasScheduler
    return scheduler(vllm_config=vllm_config, **kwargs)
