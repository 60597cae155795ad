"""Host versions of the Triton kernels that Model Runner V2 launches every step.

Takes what vLLM passes to a kernel, in the kernel's order: tensors on the CPU, numbers, and
constants by keyword. Gives the same bytes in the same tensors, in place; returns nothing. Never
sees the launch grid (vLLM's dispatcher drops it), so sizes come from the tensors: rows that exist
only in the grid, as padding for CUDA graphs, are not written. A CPU batch has none.

Names used throughout: a *request* is a row of the batch, a *slot* is its row in the runner's
persistent state, a *group* is a group of layers sharing a block table. `query_start` is
[requests+1] int32, the first token of each request in the flat batch; token counts are its
differences.

These run before and after every forward pass, so they use numpy views of the tensors (an indexing
operation costs a tenth of torch's) and copy runs of bytes by address where the kernel is given
addresses. `*_later` and `**constants` swallow arguments that newer vLLM adds and constants that
only matter to a compiler.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_diffusion.errors import UnsupportedRunnerError

if TYPE_CHECKING:
    from torch import Tensor

_INT32_BYTES = 4


def apply_staged_writes(
    output: Tensor,
    row_stride: int | Tensor,
    rows: Tensor,
    starts: Tensor,
    contents: Tensor,
    ends: Tensor,
    groups: Tensor | None = None,
    *_later: Any,
    **constants: Any,
) -> None:
    """Stand for `buffer_utils._apply_write_kernel`: copy staged runs of values into rows.

    Write i puts `contents[ends[i-1]:ends[i]]` at column `starts[i]` of row `rows[i]`; `rows`,
    `starts`, `ends` are [writes] int32. One destination: `output` is the tensor itself, of the
    dtype of `contents`, and `row_stride` its stride. With `MULTI_GROUP`: `output` [groups] uint64
    holds addresses of int32 tensors, `row_stride` [groups] int64, and `groups` [writes] int32
    chooses.
    """
    if constants.get("MULTI_GROUP", False):
        assert groups is not None
        addresses, strides = output.numpy().tolist(), row_stride.numpy().tolist()  # type: ignore[union-attr]
        chosen = groups.numpy().tolist()
        item = _INT32_BYTES
    else:
        addresses, strides = [output.data_ptr()], [row_stride]
        chosen = [0] * len(rows)
        item = output.element_size()
    assert contents.element_size() == item
    source = contents.data_ptr()
    begin = 0
    for group, row, start, end in zip(
        chosen, rows.numpy().tolist(), starts.numpy().tolist(), ends.numpy().tolist(), strict=True
    ):
        target = addresses[group] + item * (row * strides[group] + start)
        ctypes.memmove(target, source + item * begin, item * (end - begin))
        begin = end


def gather_block_tables(
    slots: Tensor,
    source_addresses: Tensor,
    target_addresses: Tensor,
    strides: Tensor,
    block_counts: Tensor,
    _block_counts_stride: int,
    num_requests: int,
    num_computed: Tensor | None = None,
    window_reach: Tensor | None = None,
    block_sizes: Tensor | None = None,
    *_later: Any,
    **constants: Any,
) -> None:
    """Stand for `block_table._gather_block_tables_kernel`: block ids of the batch's requests.

    Row `slots[i]` of each group's table is copied to row i of that group's target, as far as it is
    filled: `block_counts` [groups, slots] int32. Tables are int32, given by address ([groups]
    uint64) and row stride ([groups] int64). With `MASK_SLIDING_WINDOW` (vLLM 0.33) entries wholly
    below the window of a request's first token become 0, the null block: `window_reach` and
    `block_sizes` are [groups] int32, `num_computed` [slots] int32.
    """
    chosen = slots.numpy()[:num_requests].tolist()
    counts = block_counts.numpy()
    masked = constants.get("MASK_SLIDING_WINDOW", False)
    for group, (source, target, stride) in enumerate(
        zip(
            source_addresses.numpy().tolist(),
            target_addresses.numpy().tolist(),
            strides.numpy().tolist(),
            strict=True,
        )
    ):
        row_bytes = _INT32_BYTES * stride
        for request, slot in enumerate(chosen):
            copied = _INT32_BYTES * counts.item(group, slot)
            ctypes.memmove(target + request * row_bytes, source + slot * row_bytes, copied)
        if masked:
            assert num_computed is not None
            assert window_reach is not None
            assert block_sizes is not None
            reach, size = window_reach.numpy().item(group), block_sizes.numpy().item(group)
            for request, slot in enumerate(chosen):
                below = max(num_computed.numpy().item(slot) - reach, 0) // size if reach else 0
                hidden = min(below, counts.item(group, slot))
                ctypes.memset(target + request * row_bytes, 0, _INT32_BYTES * hidden)


def compute_slot_mappings(
    max_tokens: int,
    slots: Tensor,
    query_start: Tensor,
    positions: Tensor,
    table_addresses: Tensor,
    table_strides: Tensor,
    block_sizes: Tensor,
    enabled: Tensor,
    _sharded: Tensor,
    slot_mappings: Tensor,
    *_later: Any,
    **constants: Any,
) -> None:
    """Stand for `block_table._compute_slot_mappings_kernel`: where each token's KV goes.

    `slot_mappings` [groups, max_tokens] int64 gets block id * block size + offset of every token of
    the batch, `PAD_ID` for tokens of a dummy request (slot -1), for groups that are not `enabled`
    ([groups] bool) and for the rest of the row. `positions` is [tokens] int64. Raises
    `UnsupportedRunnerError` under context parallelism, which no CPU attention backend has.
    """
    if constants.get("CP_SIZE", 1) != 1:
        raise UnsupportedRunnerError(
            "context parallelism has no CPU stand-in: set decode_context_parallel_size=1, "
            "or install a Triton backend for this host."
        )
    pad = constants["PAD_ID"]
    first = query_start.numpy().tolist()
    runs = [(slot, first[i], first[i + 1]) for i, slot in enumerate(slots.numpy().tolist())]
    total = runs[-1][2] if runs else 0
    table_rows = 1 + max((slot for slot, _, _ in runs if slot >= 0), default=0)
    position, result = positions.numpy()[:total], slot_mappings.numpy()
    shared: dict[tuple[int, int], tuple[Any, Any]] = {}  # groups mostly have one geometry
    for group, (address, stride, size, used) in enumerate(
        zip(
            table_addresses.numpy().tolist(),
            table_strides.numpy().tolist(),
            block_sizes.numpy().tolist(),
            enabled.numpy().tolist(),
            strict=True,
        )
    ):
        result[group, total if used else 0 : max_tokens] = pad
        if not used:
            continue
        if (stride, size) not in shared:
            entry, offset = np.divmod(position, size)
            for slot, begin, end in runs:
                if slot < 0:  # reads anything, and the result is overwritten below
                    entry[begin:end] = 0
                else:
                    entry[begin:end] += stride * slot
            shared[stride, size] = entry, offset
        entry, offset = shared[stride, size]
        mapping = result[group, :total]
        np.multiply(_int32_at(address, table_rows * stride).take(entry), size, out=mapping)
        mapping += offset
        for slot, begin, end in runs:
            if slot < 0:
                mapping[begin:end] = pad


def prepare_prefill_inputs(
    input_ids: Tensor,
    lookahead: Tensor,
    _lookahead_stride: int,
    num_lookahead: int,
    slots: Tensor,
    query_start: Tensor,
    all_token_ids: Tensor,
    _all_token_ids_stride: int,
    prefill_lens: Tensor,
    num_computed: Tensor,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `input_batch._prepare_prefill_inputs_kernel`: prompt tokens into the batch.

    For requests still in their prompt: their next tokens from `all_token_ids` [slots, length] int32
    go to `input_ids` [tokens] int32, the `num_lookahead` after those (0 past the prompt) to
    `lookahead` [num_lookahead, slots]. `prefill_lens`, `num_computed` are [slots] int32.
    """
    first = query_start.numpy().tolist()
    lengths, computed = prefill_lens.numpy(), num_computed.numpy()
    ids, tokens, ahead = input_ids.numpy(), all_token_ids.numpy(), lookahead.numpy()
    for request, slot in enumerate(slots.numpy().tolist()):
        start, prompt_end = computed.item(slot), lengths.item(slot)
        if start >= prompt_end:
            continue
        begin, end = first[request], first[request + 1]
        stop = start + end - begin
        ids[begin:end] = tokens[slot, start:stop]
        if num_lookahead:
            following = tokens[slot, stop : min(stop + num_lookahead, prompt_end)]
            ahead[: len(following), slot] = following
            ahead[len(following) : num_lookahead, slot] = 0


def prepare_positions(
    positions: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    query_start: Tensor,
    num_computed: Tensor,
    max_requests: int,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `input_batch._prepare_pos_seq_lens_kernel`: positions and sequence lengths.

    A request's tokens continue at `num_computed` [slots] int32: `positions` [tokens] int64,
    `seq_lens` [max_requests] int32, zero past the batch.
    """
    chosen = slots.numpy().tolist()
    first = query_start.numpy().tolist()
    computed, lengths, result = num_computed.numpy(), seq_lens.numpy(), positions.numpy()
    for request, slot in enumerate(chosen):
        begin, end, start = first[request], first[request + 1], computed.item(slot)
        stop = start + end - begin
        lengths[request] = stop
        result[begin:end] = _counting(stop)[start:stop]
    lengths[len(chosen) : max_requests] = 0


def combine_sampled_and_draft_tokens(
    input_ids: Tensor,
    slots: Tensor,
    last_sampled: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    prefill_lens: Tensor,
    draft_tokens: Tensor,
    _draft_tokens_stride: int,
    logits_start: Tensor,
    logits_indices: Tensor,
    *_later: Any,
    **constants: Any,
) -> None:
    """Stand for `input_batch._combine_sampled_and_draft_tokens_kernel`: the canvas into the batch.

    `logits_start` [requests+1] int32 gives each request its logits rows, which are its last tokens:
    `logits_indices` [logits] int64. Past the prompt, those tokens are the draft tokens ([slots,
    width] int64), preceded by the last sampled one ([slots, 1] int64) if `NUM_NEW_SAMPLED_TOKENS`
    is 1 and it does not fall into the prompt.
    """
    bonus = constants.get("NUM_NEW_SAMPLED_TOKENS", 1)
    ends, cumulative = query_start.numpy().tolist(), logits_start.numpy().tolist()
    lengths, prompts = seq_lens.numpy(), prefill_lens.numpy()
    ids, indices = input_ids.numpy(), logits_indices.numpy()
    drafts, last = draft_tokens.numpy(), last_sampled.numpy()
    for request, slot in enumerate(slots.numpy().tolist()):
        end, low, high = ends[request + 1], cumulative[request], cumulative[request + 1]
        start = end - (high - low)
        indices[low:high] = _counting(end)[start:end]
        length, prompt = lengths.item(request), prompts.item(slot)
        if length <= prompt:
            continue
        if bonus and length - (high - low) >= prompt:
            ids[start] = last[slot, 0]
        if start + bonus < end:
            ids[start + bonus : end] = drafts[slot, : end - start - bonus]


def expand_slots(
    slots: Tensor,
    expanded_slots: Tensor,
    local_positions: Tensor,
    logits_start: Tensor,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `input_batch._expand_idx_mapping_kernel`: slot and place of every logits row.

    `expanded_slots` [logits] repeats `slots` [requests], `local_positions` [logits] int32 counts
    from 0 within each request; `logits_start` is [requests+1] int32.
    """
    first = logits_start.numpy().tolist()
    expanded, local = expanded_slots.numpy(), local_positions.numpy()
    for request, slot in enumerate(slots.numpy().tolist()):
        begin, end = first[request], first[request + 1]
        expanded[begin:end] = slot
        local[begin:end] = _counting(end - begin)[: end - begin]


def post_update(
    slots: Tensor,
    num_computed: Tensor,
    last_sampled: Tensor,
    output_counts: Tensor | None,
    _output_counts_stride: int,
    sampled: Tensor,
    _sampled_stride: int,
    num_sampled: Tensor,
    num_rejected: Tensor,
    query_start: Tensor | None,
    all_token_ids: Tensor,
    _all_token_ids_stride: int,
    total_lens: Tensor,
    draft_tokens: Tensor | None = None,
    draft_tokens_out: Tensor | None = None,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `input_batch._post_update_kernel`: what a step produced, into the slots.

    The first `num_sampled[i]` of `sampled` [requests, width] are appended to row `slots[i]` of
    `all_token_ids` at `total_lens` and counted in `output_counts` [slots, vocabulary] if there is
    one; `num_computed` advances by the query length less `num_rejected[i]`. Requests with slot -1
    are skipped. vLLM 0.33 also hands over `draft_tokens` [requests, width] for `draft_tokens_out`.
    """
    chosen = slots.numpy().tolist()
    counts, rejected = num_sampled.numpy().tolist(), num_rejected.numpy().tolist()
    first = None if query_start is None else query_start.numpy().tolist()
    computed, lens, last = num_computed.numpy(), total_lens.numpy(), last_sampled.numpy()
    tokens, history = sampled.numpy(), all_token_ids.numpy()
    for request, slot in enumerate(chosen):
        if slot < 0:
            continue
        if draft_tokens is not None:
            assert draft_tokens_out is not None
            draft_tokens_out.numpy()[slot] = draft_tokens.numpy()[request]
        queried = 0 if first is None else first[request + 1] - first[request]
        computed[slot] += queried - rejected[request]
        if (count := counts[request]) > 0:
            emitted, begin = tokens[request, :count], lens.item(slot)
            history[slot, begin : begin + count] = emitted
            last[slot, 0] = emitted[-1]
            lens[slot] = begin + count
            if output_counts is not None:
                np.add.at(output_counts.numpy()[slot], emitted, 1)


def post_update_num_computed(
    slots: Tensor, num_computed: Tensor, query_start: Tensor, *_later: Any, **_constants: Any
) -> None:
    """Stand for `input_batch._post_update_num_computed_tokens_kernel`: advance by the query length.

    Pipeline ranks that do not sample launch it. `num_computed` [slots] int32.
    """
    chosen = slots.numpy()
    num_computed.numpy()[chosen] += np.diff(query_start.numpy()[: len(chosen) + 1])


def _counting(end: int) -> Any:
    """Return 0, 1, 2, ... to at least `end`, int64, read-only: copying a run beats making one."""
    return _counting_below(end.bit_length())


@lru_cache(maxsize=64)
def _counting_below(bits: int) -> Any:
    numbers = np.arange(1 << bits)
    numbers.setflags(write=False)
    return numbers


@lru_cache(maxsize=512)
def _int32_at(address: int, count: int) -> Any:
    """Return `count` int32 at `address` as an array, without owning them.

    Kept because making one costs more than using it. An entry that outlives its tensor is harmless:
    it is only read when vLLM passes the same address again, that is, when something lives there.
    """
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(address))
