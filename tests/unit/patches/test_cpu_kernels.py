"""What the comparison with Triton's interpreter (tests/contract) cannot reach."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion.errors import UnsupportedRunnerError
from vllm_diffusion.patches import cpu_request_kernels as request
from vllm_diffusion.patches import cpu_step_kernels as step


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def addresses(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.uint64)


def slot_mappings(slots: torch.Tensor, query_start: torch.Tensor, **constants: int) -> torch.Tensor:
    table = torch.arange(1, 13, dtype=torch.int32).reshape(3, 4)
    result = torch.full((1, 10), 77)
    step.compute_slot_mappings(
        10,
        slots,
        query_start,
        torch.arange(10),
        addresses(table),
        torch.tensor([4]),
        int32(2),
        torch.tensor([True]),
        torch.tensor([True]),
        result,
        10,
        0,
        **{"PAD_ID": -1, **constants},
    )
    return result


def test_slots_of_a_request_follow_its_blocks():
    assert slot_mappings(int32(1), int32(0, 4)).tolist() == [[10, 11, 12, 13] + [-1] * 6]


def test_slots_of_a_batch_without_tokens_are_padding():
    assert slot_mappings(int32(1), int32(0, 0)).tolist() == [[-1] * 10]
    assert slot_mappings(int32(), int32(0)).tolist() == [[-1] * 10]


def test_slots_of_dummy_requests_only_are_padding():
    # Far positions too: a dummy has no blocks to look them up in.
    assert slot_mappings(int32(-1, -1), int32(0, 2, 10)).tolist() == [[-1] * 10]


def test_context_parallelism_is_refused():
    with pytest.raises(UnsupportedRunnerError, match="decode_context_parallel_size=1"):
        slot_mappings(int32(1), int32(0, 4), CP_SIZE=2)


def test_blocks_below_the_window_become_the_null_block():
    # vLLM 0.33: three more tensors and a constant.
    source = torch.arange(1, 13, dtype=torch.int32).reshape(2, 6)
    targets = [torch.full((2, 6), -5, dtype=torch.int32) for _ in range(2)]
    step.gather_block_tables(
        int32(1, 0),
        addresses(source, source),
        addresses(*targets),
        torch.tensor([6, 6]),
        torch.tensor([[3, 5], [3, 5]], dtype=torch.int32),
        2,
        2,
        int32(4, 41),  # per slot
        int32(8, 0),  # a window of 8 tokens; no window
        int32(16, 16),
        BLOCK_SIZE=1024,
        MASK_SLIDING_WINDOW=True,
    )
    assert targets[0].tolist() == [[0, 0, 9, 10, 11, -5], [1, 2, 3, -5, -5, -5]]
    assert targets[1].tolist() == [[7, 8, 9, 10, 11, -5], [1, 2, 3, -5, -5, -5]]


def test_a_window_never_clears_beyond_the_blocks_a_request_has():
    source = torch.arange(1, 5, dtype=torch.int32).reshape(1, 4)
    target = torch.full((1, 4), -5, dtype=torch.int32)
    step.gather_block_tables(
        int32(0),
        addresses(source),
        addresses(target),
        torch.tensor([4]),
        int32(2).reshape(1, 1),
        1,
        1,
        int32(900),
        int32(8),
        int32(16),
        MASK_SLIDING_WINDOW=True,
    )
    assert target.tolist() == [[0, 0, -5, -5]]


def test_stand_ins_swallow_what_newer_kernels_add():
    computed = int32(5, 6)
    step.post_update_num_computed(int32(1), computed, int32(0, 3), object(), num_warps=1, NEW=2)
    assert computed.tolist() == [5, 9]


@for_each(dtype=[torch.float32, torch.bfloat16, torch.float16])
def test_ranks_count_logits_that_are_at_least_the_tokens_own(dtype):
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, -2.0, -3.0]], dtype=dtype)
    ranks = torch.empty(2, dtype=torch.int64)
    request.ranks(ranks, logits, 4, torch.tensor([2, 3]), 4, BLOCK_SIZE=8192)
    assert ranks.tolist() == [2, 4]


def test_rows_taken_in_parts_give_what_they_give_at_once(monkeypatch):
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(0, 50, (7, 3), generator=torch.Generator().manual_seed(1))
    results = []
    for limit in (1 << 21, 120, 1):
        monkeypatch.setattr(request, "_TEMPORARY_ELEMENTS", limit)
        logprobs, ranks = torch.empty(7, 3), torch.empty(7, dtype=torch.int64)
        request.topk_log_softmax(logprobs, logits, 50, chosen, 3, 3, 50)
        request.ranks(ranks, logits, 50, chosen[:, 0], 50)
        results.append((logprobs, ranks))
    for logprobs, ranks in results[1:]:
        assert torch.equal(logprobs, results[0][0])
        assert torch.equal(ranks, results[0][1])
    assert torch.allclose(results[0][0], logits.log_softmax(-1).gather(1, chosen))


def test_a_mask_reaches_a_vocabulary_that_is_no_multiple_of_a_word():
    logits = torch.zeros(1, 70, dtype=torch.bfloat16)
    bitmask = int32(0, -1, 0b100001).reshape(1, 3)
    request.apply_grammar_bitmask(
        logits, 70, int32(0), int32(0, 1), bitmask, 3, 70, MASK_STRIDE=4, BLOCK_SIZE=8192
    )
    allowed = logits[0].isfinite().nonzero().flatten().tolist()
    assert allowed == [*range(32, 64), 64, 69]


def test_the_row_after_a_full_history_keeps_what_it_held():
    tokens = torch.full((3,), 77)
    history = int32(1, 2, 3).reshape(1, 3)
    request.prompt_logprob_token_ids(tokens, int32(0, 3), int32(0), int32(0), history, 3)
    assert tokens.tolist() == [2, 3, 77]
