"""Looks inside a running engine of this process: what every canvas saw, became and committed.

Takes no engine: while a ``Probe`` is active it wraps the points every canvas passes (attention
metadata, the model's forward, ``advance``), whichever engine runs. Gives one ``ProbedRun`` a
request, found by the seed the request was sent with, in the terms of ``helpers.oracle``.

Never changes a number. Only for engines in this process: VLLM_ENABLE_V1_MULTIPROCESSING=0.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch

import torch

from vllm_diffusion.head.stream import StreamingHead

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.engine.model_state import CanvasModelState
    from vllm_diffusion.head import Head
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision, Emission
    from vllm_diffusion.rules.entropy_bound import EntropyBound
    from vllm_diffusion.rules.rule import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedStep:
    """One pass of a canvas through ``advance``. L is the canvas's width."""

    start: int  # absolute position of the first row
    step: int  # of the schedule
    canvas: Tensor  # [L] int64, input of the forward
    logits: Tensor  # [L, V] fp32
    argmax: Tensor  # [L] int64
    sample: Tensor  # [L] int64
    accept: Tensor  # [L] bool
    next_canvas: Tensor  # [L] int64, accepted samples and fresh noise
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedContext:
    """What the paged cache holds of a request's text when one of its canvases starts."""

    length: int  # positions of text, P
    keys: dict[int, Tensor]  # layer -> [P, kv heads, head dim]
    values: dict[int, Tensor]  # layer -> [P, kv heads, head dim]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbedForward:
    """What shared one forward, in requests; a fused one is among canvases and commits."""

    requests: int
    prompts: int
    canvases: int
    commits: int


@dataclass(slots=True)
class ProbedRun:
    """Everything one request went through."""

    attempts: list[list[ProbedStep]] = field(default_factory=list)
    """Canvases in the order they began; preemption makes one begin again."""
    commits: list[tuple[int, list[int]]] = field(default_factory=list)
    """(start, tokens) of every canvas that left: in its commit, or if fused in its last step."""
    contexts: dict[int, ProbedContext] = field(default_factory=dict)
    """The cache at the start of the canvas at this position (its latest attempt)."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """Position -> [H] final hidden state of its prompt or commit row."""
    prompt_chunks: list[int] = field(default_factory=list)
    """Rows of every forward that ran some of the request's prompt."""

    @property
    def canvases(self) -> list[list[ProbedStep]]:
        """The completed attempt of every canvas, by position."""
        latest = {attempt[0].start: attempt for attempt in self.attempts if attempt[-1].finished}
        return [latest[start] for start in sorted(latest)]


class Probe:
    """Watches every engine of this process between ``with Probe() as probe:`` and its end."""

    def __init__(self) -> None:
        self.runs: dict[int, ProbedRun] = {}
        self.forwards: list[ProbedForward] = []
        self.preemptions = 0
        self._patches = ExitStack()
        self._batch: InputBatch | None = None
        self._metadata: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._canvas_rows: list[int] = []
        self._pool: CanvasPool | None = None
        self._decided: list[tuple[CanvasStats, Decision]] = []

    def run(self, seed: int) -> ProbedRun:
        """The request that was sent with this seed."""
        assert seed in self.runs, f"no request with seed {seed}; seen {sorted(self.runs)}"
        return self.runs[seed]

    def __enter__(self) -> Self:
        from vllm.v1.core.sched.scheduler import Scheduler

        from vllm_diffusion.engine import sampler as sampler_module
        from vllm_diffusion.engine.model_state import CanvasModelState
        from vllm_diffusion.models.diffusion_gemma.model import DiffusionGemmaForBlockDiffusion
        from vllm_diffusion.rules.entropy_bound import EntropyBound

        for owner, name, wrapper in (
            (CanvasModelState, "prepare_attn", self._around_prepare_attn),
            (DiffusionGemmaForBlockDiffusion, "forward", self._around_forward),
            (EntropyBound, "decide", self._around_decide),
            (sampler_module, "advance", self._around_advance),
            (Scheduler, "_preempt_request", self._around_preempt),
        ):
            self._patches.enter_context(patch.object(owner, name, wrapper(getattr(owner, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    # ---- the wrapped points, in the order a forward passes them ----

    def _around_prepare_attn(self, inner: Any) -> Any:
        def prepare_attn(
            state: CanvasModelState, input_batch: InputBatch, *args: Any, **kw: Any
        ) -> Any:
            metadata = inner(state, input_batch, *args, **kw)
            self._batch, self._metadata, self._pool = input_batch, metadata, state.pool
            self._layers = state.vllm_config.compilation_config.static_forward_context
            # The flag as this forward has it: advance turns it.
            causal = state.pool.causal[input_batch.idx_mapping].tolist()
            drafts = input_batch.num_draft_tokens_per_req
            drafts = [0] * len(causal) if drafts is None else drafts.tolist()
            self._canvas_rows = [0 if c else d for c, d in zip(causal, drafts, strict=True)]
            return metadata

        return prepare_attn

    def _around_forward(self, inner: Any) -> Any:
        from vllm.forward_context import get_forward_context

        def forward(model: Any, input_ids: Any, positions: Tensor, *args: Any, **kw: Any) -> Any:
            hidden = inner(model, input_ids, positions, *args, **kw)
            if self._batch is not None and get_forward_context().attn_metadata is self._metadata:
                self._keep_text_rows(positions, hidden)
            return hidden

        return forward

    def _around_decide(self, inner: Any) -> Any:
        def decide(
            rule: EntropyBound, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats
        ) -> Decision:
            decision = inner(rule, pool, batch, stats)
            self._decided.append((stats, decision))
            return decision

        return decide

    def _around_advance(self, inner: Any) -> Any:
        def advance(
            pool: CanvasPool,
            batch: CanvasBatch,
            hidden: Tensor,
            head: Head,
            rule: Rule,
            **hooks: Any,
        ) -> Emission:
            before = (
                pool.tokens[batch.slots].clone(),
                pool.step[batch.slots].tolist(),
                pool.causal[batch.slots].tolist(),
            )
            taken = (pool.step - pool.first_step)[batch.slots].tolist()
            self._keep_contexts(pool, batch, taken, before[2])
            emission = inner(pool, batch, hidden, head, rule, **hooks)
            whole = head.whole if isinstance(head, StreamingHead) else head
            stats, decision = self._decided.pop()
            assert self._batch is not None
            for row, (slot, width) in enumerate(
                zip(batch.slots.tolist(), batch.width.tolist(), strict=True)
            ):
                run = self._run_of(pool, slot)
                start = int(batch.position[row, 0])
                if before[2][row]:
                    run.commits.append((start, emission.tokens[row, :width].tolist()))
                    continue
                if taken[row] == 0:
                    run.attempts.append([])
                run.attempts[-1].append(
                    ProbedStep(
                        start=start,
                        step=before[1][row],
                        canvas=before[0][row, :width],
                        logits=whole.logits(hidden[row, :width]).clone(),
                        argmax=stats.argmax[row, :width],
                        sample=stats.sample[row, :width],
                        accept=decision.accept[row, :width],
                        next_canvas=decision.next_tokens[row, :width],
                        finished=bool(decision.finished[row]),
                    )
                )
                if emission.count[row]:
                    run.commits.append((start, emission.tokens[row, :width].tolist()))
            return emission

        return advance

    def _around_preempt(self, inner: Any) -> Any:
        def preempt(*args: Any, **kwargs: Any) -> Any:
            self.preemptions += 1
            return inner(*args, **kwargs)

        return preempt

    # ---- what is kept ----

    def _run_of(self, pool: CanvasPool, slot: int) -> ProbedRun:
        low, high = pool.seed[slot].tolist()
        return self.runs.setdefault(low + (high << 32), ProbedRun())

    def _keep_text_rows(self, positions: Tensor, hidden: Tensor) -> None:
        batch, pool = self._batch, self._pool
        assert batch is not None
        assert pool is not None
        prompts = int(batch.is_prefilling_np[: batch.num_reqs].sum())
        self.forwards.append(
            ProbedForward(
                requests=batch.num_reqs,
                prompts=prompts,
                canvases=sum(rows > 0 for rows in self._canvas_rows),
                commits=int((batch.num_scheduled_tokens > self._canvas_rows).sum()) - prompts,
            )
        )
        starts = batch.query_start_loc_np.tolist()
        for index, slot in enumerate(batch.idx_mapping_np.tolist()):
            rows = slice(starts[index], starts[index + 1] - self._canvas_rows[index])
            run = self._run_of(pool, slot)
            run.hidden.update(zip(positions[rows].tolist(), hidden[rows].clone(), strict=True))
            if batch.is_prefilling_np[index]:
                run.prompt_chunks.append(rows.stop - rows.start)

    def _keep_contexts(
        self, pool: CanvasPool, batch: CanvasBatch, steps: list[int], causal: list[bool]
    ) -> None:
        assert self._batch is not None
        row_of = {slot: row for row, slot in enumerate(self._batch.idx_mapping_np.tolist())}
        for index, slot in enumerate(batch.slots.tolist()):
            if causal[index] or steps[index]:
                continue
            length = int(batch.position[index, 0])
            cached = {
                int(match[1]): read_cache(
                    self._layers[name], metadata.block_table[row_of[slot]], length
                )
                for name, metadata in self._metadata.items()
                if (match := re.search(r"layers\.(\d+)\.", name))
            }
            self._run_of(pool, slot).contexts[length] = ProbedContext(
                length=length,
                keys={layer: both[0] for layer, both in cached.items()},
                values={layer: both[1] for layer, both in cached.items()},
            )


def read_cache(layer: Any, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [length, kv heads, head dim] of one request in one layer's paged cache.

    Blocks that a sliding layer has given back read as whatever stands in them now.

    Args:
        layer: vLLM's attention layer.
        block_table: [blocks] int32 of the request.
        length: positions to read.
    """
    blocks, heads, size, double = layer.kv_cache.shape
    dim = double // 2
    used = block_table[: -(-length // size)].long()
    parts = layer.kv_cache.view(blocks, heads, 2, size * dim)[used]
    sides = []
    for side, order in enumerate(cache_order(heads, size, dim, layer.isa)):
        part = parts[:, :, side][..., order].unflatten(-1, (size, dim))
        sides.append(part.transpose(1, 2).flatten(0, 1)[:length])
    return sides[0], sides[1]


@cache
def cache_order(heads: int, size: int, dim: int, isa: str) -> tuple[Tensor, Tensor]:
    """Where the CPU kernels put element (token, dim) of a block, for keys and for values.

    Each is [size * dim] int64.

    Keys are packed for the instruction set. Instead of repeating the kernel's rule, let it write a
    block whose elements are their own numbers and see where they went.
    """
    from vllm import _custom_ops as ops

    numbers = torch.arange(size * dim, dtype=torch.float32).view(size, 1, dim)
    numbers = numbers.expand(size, heads, dim).contiguous()
    stored = torch.full((1, heads, 2 * size, dim), -1.0)
    keys, values = stored.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(numbers, numbers, keys, values, torch.arange(size), isa)
    orders = []
    for part in (keys, values):
        flat = part[0].reshape(heads, size * dim).long()
        assert bool((flat == flat[0]).all()), "heads are packed apart: read them one by one"
        order = torch.empty(size * dim, dtype=torch.int64)
        order[flat[0]] = torch.arange(size * dim)
        assert torch.equal(flat[0][order], torch.arange(size * dim)), "not a permutation"
        orders.append(order)
    return orders[0], orders[1]
