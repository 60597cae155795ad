"""Every stand-in writes what the Triton kernel it stands for writes.

The same calls into vLLM's own functions run in two processes: one with vLLM's kernels in Triton's
interpreter, one with the stand-ins. Each call starts from random state with room around what it may
touch, and all of that state must come out equal, bit for bit. Log-probabilities sum in another
order; they are held to the error of the kernel itself against fp64.

Run as a program (`python test_cpu_kernels.py triton OUT`) this file computes one side.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.vllm

SLOTS = 8
TOKENS = 96
LENGTH = 64
CPU = torch.device("cpu")
SEEDS = range(4)


class Batch:
    """A random batch: which slots, how many tokens each, how far each has come."""

    def __init__(self, seed: int, requests: int) -> None:
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.slots = torch.randperm(SLOTS, generator=self.generator)[:requests].to(torch.int32)
        lengths = self.draw(0, 13, requests)  # a request may have no token in a step
        self.query_start = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
        self.tokens = int(self.query_start[-1])
        self.computed = self.draw(0, 20, SLOTS)
        self.prefill = self.draw(1, 30, SLOTS)  # some slots are inside their prompt, some past it
        self.history = self.draw(0, 500, SLOTS, LENGTH)

    def draw(self, low: int, high: int, *shape: int, dtype: Any = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype)


def staged_writes(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

    batch = Batch(seed, 4)
    for size, dtype in (
        ((SLOTS, LENGTH), torch.int32),
        (SLOTS, torch.int64),
        (SLOTS, torch.float32),
    ):
        tensor = StagedWriteTensor(size, dtype, CPU)
        tensor.gpu.copy_(batch.draw(0, 99, *tensor.gpu.shape))
        for slot in batch.slots.tolist():
            if isinstance(size, int):
                tensor.stage_write_elem(slot, slot + 100)
            else:
                start, count = batch.draw(0, LENGTH // 2, 2).tolist()
                tensor.stage_write(slot, start, list(range(count)))
        tensor.apply_write()
        tensor.apply_write()  # nothing staged
        yield tensor.gpu


def block_tables(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu.block_table import BlockTables

    for block_sizes in ([16], [16, 32, 16]):
        batch = Batch(seed, 1 + seed)
        groups = len(block_sizes)
        options: dict[str, Any] = {"slot_mapping_enabled": [group != 1 for group in range(groups)]}
        windowed = "sliding_window_reach" in inspect.signature(BlockTables).parameters
        if windowed:
            options["sliding_window_reach"] = [8, 0, 17][:groups]
        tables = BlockTables(block_sizes, SLOTS, TOKENS, [6, 4, 7][:groups], CPU, **options)
        for slot in range(SLOTS):
            counts = batch.draw(0, 4, groups).tolist()
            ids = tuple(batch.draw(1, 900, count).tolist() for count in counts)
            tables.append_block_ids(slot, ids, overwrite=True)
        tables.apply_staged_writes()
        for slot in batch.slots.tolist():  # one more block each, as decoding does
            tables.append_block_ids(slot, tuple([7 + slot] for _ in ids), overwrite=False)
        tables.apply_staged_writes()
        yield from (table.gpu for table in tables.block_tables)

        for target in tables.input_block_tables:
            target.fill_(-5)
        known = {"num_computed_tokens": batch.computed + 20} if windowed else {}
        tables.gather_block_tables(batch.slots, len(batch.slots), **known)
        yield from tables.input_block_tables

        position = torch.zeros(TOKENS, dtype=torch.int64)
        for request, slot in enumerate(batch.slots.tolist()):
            begin, end = batch.query_start[request : request + 2].tolist()
            position[begin:end] = torch.arange(end - begin) + batch.computed[slot]
        for slots in (batch.slots, torch.where(batch.slots % 2 == 0, -1, batch.slots)):
            tables.slot_mappings.fill_(77)
            tables.compute_slot_mappings(slots, batch.query_start, position, TOKENS)
            yield tables.slot_mappings.clone()


def prefill_inputs(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu.input_batch import prepare_prefill_inputs

    for lookahead in (1, 3):
        batch = Batch(seed, 5)
        input_ids, ahead = batch.draw(0, 500, TOKENS), batch.draw(0, 500, lookahead, SLOTS)
        arguments = (batch.query_start, batch.history, batch.prefill, batch.computed)
        prepare_prefill_inputs(input_ids, ahead, batch.slots, *arguments)
        yield from (input_ids, ahead)


def positions(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu.input_batch import prepare_pos_seq_lens

    for requests in (1, 5, SLOTS):
        batch = Batch(seed, requests)
        position = batch.draw(0, 500, TOKENS, dtype=torch.int64)
        lengths = batch.draw(0, 500, SLOTS)
        prepare_pos_seq_lens(batch.slots, batch.query_start, batch.computed, position, lengths)
        yield from (position, lengths)


def combined_tokens(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu.input_batch import combine_sampled_and_draft_tokens

    for bonus in (0, 1):
        batch = Batch(seed, 6)
        lengths = batch.query_start.diff()
        # A canvas row scores all its tokens, a prompt none (or, with a bonus token, its last).
        scored = torch.where(batch.draw(0, 2, 6) == 1, lengths, lengths.clamp(max=bonus))
        logits_start = torch.cat([torch.zeros(1), scored.cumsum(0)]).to(torch.int32)
        input_ids = batch.draw(0, 500, TOKENS)
        last = batch.draw(0, 500, SLOTS, 1, dtype=torch.int64)
        drafts = batch.draw(0, 500, SLOTS, 16, dtype=torch.int64)
        seq_lens = batch.computed[batch.slots.long()] + lengths
        indices = combine_sampled_and_draft_tokens(
            input_ids,
            batch.slots,
            last,
            batch.query_start,
            seq_lens,
            batch.prefill,
            drafts,
            logits_start,
            int(logits_start[-1]),
            bonus,
        )
        yield from (input_ids, indices)


def expanded_slots(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu.input_batch import expand_idx_mapping

    batch = Batch(seed, 1 + 2 * (seed % 3))
    yield from expand_idx_mapping(batch.slots, batch.tokens, batch.query_start, 16)


def post_update(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu import input_batch

    for with_counts, with_query in ((False, True), (True, True), (False, False)):
        batch = Batch(seed, 6)
        slots = batch.slots.clone()
        slots[seed % 6] = -1  # a preempted request
        last = batch.draw(0, 500, SLOTS, 1, dtype=torch.int64)
        counts = batch.draw(0, 3, SLOTS, 500) if with_counts else None
        sampled = batch.draw(0, 500, 6, 13, dtype=torch.int64)
        num_sampled = batch.draw(0, 13, 6) * batch.draw(0, 2, 6)
        num_rejected = batch.draw(0, 13, 6)
        totals = batch.draw(0, 50, SLOTS)
        extra = {}
        if "draft_tokens" in inspect.signature(input_batch.post_update).parameters:
            out = batch.draw(0, 500, SLOTS, 4, dtype=torch.int64)
            extra = {"draft_tokens": batch.draw(0, 500, 6, 4, dtype=torch.int64)}
            extra["draft_tokens_out"] = out
        input_batch.post_update(
            slots,
            batch.computed,
            last,
            counts,
            sampled,
            num_sampled,
            num_rejected,
            batch.query_start if with_query else None,
            batch.history,
            totals,
            **extra,
        )
        yield from (batch.computed, last, batch.history, totals, *extra.values())
        if counts is not None:
            yield counts
    input_batch.post_update_num_computed_tokens(batch.slots, batch.computed, batch.query_start)
    yield batch.computed


def logprobs(seed: int) -> Iterator[torch.Tensor]:
    """Yield token ids and ranks, then log-probabilities and their fp64 truth."""
    from vllm.v1.worker.gpu.sample.logprob import LogprobTokenIdsState, compute_topk_scores

    batch = Batch(seed, 6)
    rows, vocabulary = 11, 3001
    logits = torch.randn(rows, vocabulary, generator=batch.generator) * 8
    # Not bfloat16: the interpreter compares its bit patterns.
    logits = logits.to((torch.float32, torch.float16)[seed % 2])
    sampled = batch.draw(0, vocabulary, rows, dtype=torch.int64)
    logits[0, :5] = logits[0, sampled[0]]  # ties count
    state = LogprobTokenIdsState(SLOTS, CPU)
    for slot in batch.slots[:2].tolist():
        state.token_ids.stage_write(slot, 0, [3, 1, 4, 1, 5][: 2 + seed])
        state.num_token_ids.np[slot] = len([3, 1, 4, 1, 5][: 2 + seed])
    state.apply_staged_writes()
    expanded = batch.slots[batch.draw(0, 6, rows).long()]
    for top, custom in ((0, 0), (4, 0), (0, 5), (4, 5), (2, 5)):
        result = compute_topk_scores(
            logits,
            top,
            sampled,
            logprob_token_ids_state=state,
            expanded_idx_mapping=expanded,
            max_per_req_token_ids=custom,
        )
        truth = logits.double().log_softmax(-1).gather(1, result.logprob_token_ids)
        truth = truth.masked_fill(result.logprobs == float("-inf"), float("-inf"))
        yield from (result.logprob_token_ids, result.selected_token_ranks)
        yield from (result.logprobs, truth)


def prompt_logprob_ids(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu.sample.prompt_logprob import get_prompt_logprobs_token_ids

    batch = Batch(seed, 5)
    yield get_prompt_logprobs_token_ids(
        batch.tokens, batch.query_start, batch.slots, batch.computed, batch.history
    )


def grammar_bitmask(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker.gpu import structured_outputs

    batch = Batch(seed, 4)
    vocabulary, stride = 1000, 13
    logits = torch.randn(batch.tokens, vocabulary, generator=batch.generator)
    if seed % 2:
        logits = logits.bfloat16()
    # Position 5 of a request with fewer logits must not touch its neighbour's.
    rows = torch.tensor([request * stride + row for request in range(4) for row in (0, 5)])
    words = -(-vocabulary // 32)
    bitmask = batch.draw(-(2**31), 2**31 - 1, len(rows), words, dtype=torch.int64).to(torch.int32)
    structured_outputs._apply_grammar_bitmask_kernel[(len(rows), 1)](
        logits,
        logits.stride(0),
        rows.to(torch.int32),
        batch.query_start,
        bitmask,
        bitmask.stride(0),
        vocabulary,
        MASK_STRIDE=stride,
        BLOCK_SIZE=1024,
    )
    yield logits


def zeroed_blocks(seed: int) -> Iterator[torch.Tensor]:
    from vllm.v1.worker import utils

    batch = Batch(seed, 1)
    caches = [batch.draw(1, 99, 10, 48), batch.draw(1, 99, 10, 20)]
    sizes = [40, 20]  # the first segment clears part of each block only
    utils._zero_kv_blocks_kernel[(3, 2, 2)](
        torch.tensor([cache.data_ptr() for cache in caches], dtype=torch.uint64),
        torch.tensor([cache.stride(0) for cache in caches]),
        torch.tensor(sizes),
        torch.tensor([0, 4, 9]),
        BLOCK_SIZE=32,
    )
    yield from caches


SCENARIOS: tuple[Callable[[int], Iterator[torch.Tensor]], ...] = (
    staged_writes,
    block_tables,
    prefill_inputs,
    positions,
    combined_tokens,
    expanded_slots,
    post_update,
    logprobs,
    prompt_logprob_ids,
    grammar_bitmask,
    zeroed_blocks,
)


def accept_wide_masks() -> None:
    """Let the interpreter store under a mask that its own `&` widened from bits to integers."""
    from triton.runtime.interpreter import InterpreterBuilder

    store = InterpreterBuilder.create_masked_store

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        mask.data = mask.data.astype(bool)
        return store(self, ptrs, value, mask, *options)

    InterpreterBuilder.create_masked_store = create_masked_store


def compute(kernels: str, path: str) -> None:
    """Run every scenario with one kind of kernel and save what it yields."""
    if kernels == "triton":
        # The interpreter needs no backend, but vLLM looks for one by name before it uses Triton.
        from triton.backends import backends

        driver = types.SimpleNamespace(is_active=lambda: True)
        backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
        accept_wide_masks()
    # First, as in a CPU worker: it replaces device buffers by host buffers.
    import vllm.v1.worker.cpu.shm  # noqa: F401
    from vllm.triton_utils import HAS_TRITON

    from vllm_diffusion.patches import cpu_kernels

    assert (kernels == "triton") == HAS_TRITON
    if kernels != "triton":
        cpu_kernels.complete_placeholder()
        cpu_kernels.install()
    results = {
        (scenario.__name__, seed): [tensor.clone() for tensor in scenario(seed)]
        for scenario in SCENARIOS
        for seed in SEEDS
    }
    torch.save(results, path)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("triton", reason="vLLM's kernels are run in Triton's interpreter")
    folder: Path = tmp_path_factory.mktemp("kernels")
    found = {}
    for kernels, interpret in (("triton", "1"), ("stand-ins", "0")):
        path = folder / kernels
        environment = os.environ | {"TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, __file__, kernels, str(path)],
            env=environment | {"VLLM_DIFFUSION": "0"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        found[kernels] = torch.load(path)
    return found


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_stand_in_writes_what_the_kernel_writes(results, scenario, subtests):
    for seed in SEEDS:
        with subtests.test(seed=seed):
            expected, found = (results[kind][scenario, seed] for kind in ("triton", "stand-ins"))
            assert len(expected) == len(found) > 0
            pairs = list(zip(expected, found, strict=True))
            if scenario == "logprobs":
                pairs = [pair for i, pair in enumerate(pairs) if i % 4 < 2]  # ids and ranks
            for i, (kernel, ours) in enumerate(pairs):
                assert kernel.dtype == ours.dtype
                assert torch.equal(kernel, ours), f"tensor {i}: {kernel} became {ours}"


def test_log_probabilities_are_as_exact_as_the_kernels(results, subtests):
    for seed in SEEDS:
        with subtests.test(seed=seed):
            kernels, ours = (results[kind]["logprobs", seed] for kind in ("triton", "stand-ins"))
            for i in range(2, len(ours), 4):
                finite = ours[i].isfinite()
                assert torch.equal(finite, kernels[i].isfinite())
                truth = ours[i + 1]
                error = (ours[i] - truth).abs()[finite].max()
                kernel_error = (kernels[i] - truth).abs()[finite].max()
                ulp = torch.finfo(torch.float32).eps * truth[finite].abs().max()
                assert error <= kernel_error + 2 * ulp


if __name__ == "__main__":
    compute(*sys.argv[1:])
