"""A scheduler of ours without an engine: real vLLM scheduler, a worker that only counts.

Takes a ``VllmConfig``. Gives a scheduler with a KV cache of any size and ``drive``, which runs it
against ``CountingWorker``: the contract of ``CanvasSampler`` (what a step gains, what it rejects)
without a model. With ``depth`` 2 steps are scheduled before the results of the last are known, as
asynchronous scheduling does on a GPU.
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_diffusion.denoise.constants import RuleConstants
from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.scheduler import WholeCanvasMixin
from vllm_diffusion.request.admitted import admitted
from vllm_diffusion.request.options import read_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

BLOCK = 16
WINDOW = 32
TEXT = 100
"""The token every canvas commits, unless a stop is planned."""
NO_RULE = RuleConstants(max_steps=1)
"""Of a request that nobody admitted; this worker follows no rule."""
STOP = 101


@dataclass(frozen=True, slots=True)
class Canvas:
    """One canvas from its first forward to where its tokens leave, as the worker saw it."""

    request: str
    start: int
    widths: tuple[int, ...]  # rows of every forward
    tokens: int  # given


@dataclass(slots=True)
class _Slot:
    prefill: int
    computed: int
    fused: bool
    owed: int = 0
    """Tokens that left and are not computed."""
    widths: list[int] = field(default_factory=list)


@dataclass(slots=True)
class CountingWorker:
    """Takes scheduled steps in order; a canvas takes ``steps`` forwards and one to commit.

    Unless commits are fused: its rows then come back with the next canvas, or alone. Which, says
    the worker where the scheduler granted them without knowing, see ``engine.fusion``.
    """

    steps: int = 3
    fuses: bool = False
    """Whether the scheduler can fuse commits; ``drive`` knows."""
    foreseen: bool = False
    """Whether it grants rows before it knows what they are; ``drive`` knows."""
    cries_wolf: bool = False
    """Whether requests ask for canvases of one step, so that every step is taken for the last."""
    partial: int = 0
    """Every canvas commits so many tokens less than its width, at least one."""
    stop_at: Mapping[str, int] = field(default_factory=dict)
    """Request -> absolute position at which STOP is committed."""
    canvases: list[Canvas] = field(default_factory=list)
    forwards: list[dict[str, int]] = field(default_factory=list)
    slots: dict[str, _Slot] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)
    ran: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Forwards by request and kind: denoise, commit, fused; padded is a denoise among them."""
    _decoded: set[str] = field(default_factory=set)

    def execute(self, scheduled: SchedulerOutput) -> tuple[ModelRunnerOutput, DraftTokenIds | None]:
        """Run one step; everything a canvas must never meet is an assertion here."""
        preempted = scheduled.preempted_req_ids or set()
        self.preempted |= preempted
        for gone in scheduled.finished_req_ids | preempted:
            self.slots.pop(gone, None)
        for new in scheduled.scheduled_new_reqs:
            assert new.prefill_token_ids is not None
            asked = carriers.admitted(new.sampling_params, NO_RULE).fused_commit
            fused = self.fuses and asked is not False
            self.slots[new.req_id] = _Slot(
                len(new.prefill_token_ids), new.num_computed_tokens, fused
            )
        self.forwards.append(dict(scheduled.num_scheduled_tokens))
        self._decoded = {
            request
            for request, slot in self.slots.items()
            if slot.computed >= slot.prefill and request in scheduled.num_scheduled_tokens
        }
        sampled = [
            self._run(request, rows, len(scheduled.scheduled_spec_decode_tokens.get(request, ())))
            for request, rows in scheduled.num_scheduled_tokens.items()
        ]
        requests = list(scheduled.num_scheduled_tokens)
        output = ModelRunnerOutput(
            req_ids=requests,
            req_id_to_index={request: index for index, request in enumerate(requests)},
            sampled_token_ids=sampled,
        )
        return output, DraftTokenIds(requests, [[]] * len(requests))

    def decodes(self, request: str) -> bool:
        """Whether the rows of the step were behind the request's prompt."""
        return request in self._decoded

    def _run(self, request: str, rows: int, drafts: int) -> list[int]:
        slot = self.slots[request]
        if slot.fused and slot.computed >= slot.prefill:
            return self._run_fused(request, slot, rows, drafts)
        if not drafts:
            slot.computed += rows
            assert slot.computed <= slot.prefill, (
                f"{request}: rows that are neither text nor canvas"
            )
            return []
        assert slot.computed >= slot.prefill, f"{request}: a canvas before the end of the prompt"
        assert rows == drafts, f"{request}: {rows} rows for a canvas of {drafts}"
        slot.widths.append(rows)
        commits = len(slot.widths) > self.steps
        self.ran[request, "commit" if commits else "denoise"] += 1
        if not commits:
            return []
        tokens = self._emit(request, slot)
        slot.computed += len(tokens)
        return tokens

    def _run_fused(self, request: str, slot: _Slot, rows: int, drafts: int) -> list[int]:
        text = rows - drafts
        if self.foreseen and drafts and text != slot.owed:
            assert text in {0, drafts}, f"{request}: {text} rows in front of {drafts}"
            if slot.owed:
                slot.computed, slot.owed = slot.computed + slot.owed, 0
                self.ran[request, "commit"] += 1
                return []
            self.ran[request, "padded"] += 1
            text = 0
        assert text == slot.owed, f"{request}: {text} commit rows where {slot.owed} are owed"
        slot.computed, slot.owed = slot.computed + text, 0
        kind = "denoise" if not text else "fused" if drafts else "commit"
        self.ran[request, kind] += 1
        if not drafts:
            return []
        slot.widths.append(drafts)
        if len(slot.widths) < self.steps:
            return []
        tokens = self._emit(request, slot)
        slot.owed = len(tokens)
        return tokens

    def _emit(self, request: str, slot: _Slot) -> list[int]:
        start, count = slot.computed, max(1, slot.widths[-1] - self.partial)
        self.canvases.append(Canvas(request, start, tuple(slot.widths), count))
        slot.widths = []
        stop, behind = self.stop_at.get(request, -1), start + count
        return [STOP if position == stop else TEXT for position in range(start, behind)]


@cache
def _manager(key: int) -> StructuredOutputManager:
    return StructuredOutputManager(_configs[key])


_configs: dict[int, VllmConfig] = {}


def make_scheduler(
    config: VllmConfig,
    scheduler_class: type[Scheduler],
    *,
    blocks: int = 1000,
    max_model_len: int = 512,
    max_num_seqs: int = 8,
    budget: int = 512,
    policy: str = "fcfs",
    log_stats: bool = True,
) -> Scheduler:
    """A scheduler on a copy of the config, over one full and one sliding attention group."""
    changed = copy.copy(config)
    changed.cache_config = copy.copy(config.cache_config)
    changed.cache_config.block_size = BLOCK
    changed.cache_config.num_gpu_blocks = blocks
    changed.model_config = copy.copy(config.model_config)
    changed.model_config.max_model_len = max_model_len
    changed.scheduler_config = copy.copy(config.scheduler_config)
    changed.scheduler_config.max_num_seqs = max_num_seqs
    changed.scheduler_config.max_num_batched_tokens = budget
    changed.scheduler_config.max_num_scheduled_tokens = budget
    changed.scheduler_config.policy = policy
    changed.scheduler_config.async_scheduling = "Async" in scheduler_class.__name__
    _configs.setdefault(id(config), config)
    shape: dict[str, Any] = {
        "block_size": BLOCK,
        "num_kv_heads": 1,
        "head_size": 32,
        "dtype": torch.float32,
    }
    groups = [
        KVCacheGroupSpec(["full"], FullAttentionSpec(**shape)),
        KVCacheGroupSpec(["sliding"], SlidingWindowSpec(**shape, sliding_window=WINDOW)),
    ]
    return scheduler_class(
        vllm_config=changed,
        kv_cache_config=KVCacheConfig(blocks, [], groups),
        structured_output_manager=_manager(id(config)),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=log_stats,
    )


def make_request(
    name: str,
    prompt: int,
    max_tokens: int,
    *,
    width: int | None = None,
    fused: bool | None = None,
    priority: int = 0,
) -> Request:
    """A request of ``prompt`` tokens that nobody else's prefix equals."""
    init_none_hash(sha256)
    options = {"diffusion_canvas_length": width, "diffusion_fused_commit": fused}
    sampling = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        stop_token_ids=[STOP],
        extra_args={name: value for name, value in options.items() if value is not None} or None,
    )
    return Request(
        request_id=name,
        prompt_token_ids=[200 + (_number(name) + i) % 251 for i in range(prompt)],
        priority=priority,
        sampling_params=sampling,
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def _number(name: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(name))


def drive(
    scheduler: Scheduler,
    worker: CountingWorker,
    requests: Sequence[Request],
    *,
    canvas: int,
    depth: int = 1,
    between: Callable[[int], None] | None = None,
    limit: int = 5000,
) -> dict[str, list[int]]:
    """Run until nothing is left; the tokens every request was given.

    Args:
        depth: steps scheduled before the oldest of them is accounted for.
        between: called with the number of every step before it is scheduled.
        limit: more steps than this are a hang.
    """
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    worker.fuses = isinstance(scheduler, WholeCanvasMixin)
    worker.foreseen = depth > 1
    rules = carriers.served(scheduler.vllm_config.model_config.hf_config).rules
    for request in requests:
        most = {"diffusion_max_steps": 1 if worker.cries_wolf else worker.steps}
        request.sampling_params.extra_args = most | (request.sampling_params.extra_args or {})
        options, _ = read_options(request.sampling_params.extra_args)
        carriers.put_admitted(request.sampling_params, admitted(options, rules))
        scheduler.add_request(request)
    in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
    for number in range(limit):
        if between is not None:
            between(number)
        if not (scheduler.has_requests() or in_flight):
            return tokens
        scheduled = scheduler.schedule()
        ran = bool(scheduled.num_scheduled_tokens)
        if ran or scheduled.finished_req_ids:
            output, drafts = worker.execute(scheduled)
            in_flight.append((scheduled, output))
            if depth == 1 and drafts is not None:
                drafts.draft_token_ids[:] = [[-1] * canvas for _ in drafts.req_ids]
        if in_flight and (len(in_flight) >= depth or not ran):
            done, result = in_flight.popleft()
            for outputs in scheduler.update_from_output(done, result).values():
                for each in outputs.outputs:
                    tokens[each.request_id] += each.new_token_ids
        if ran and depth == 1:
            scheduler.update_draft_token_ids(drafts)
    message = f"still running after {limit} steps: {[r.request_id for r in scheduler.running]}"
    raise AssertionError(message)


def assert_nothing_is_left(scheduler: Scheduler) -> None:
    """No request, and every KV block but vLLM's null block free."""
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
