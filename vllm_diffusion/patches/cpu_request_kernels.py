"""Host versions of the Triton kernels that run only when something asks for them.

A request asks for log-probabilities or a grammar, or a cache of mixed precision asks for zeroed
blocks. Same conventions as `cpu_step_kernels.py`. Logits are [rows, vocabulary] of any float dtype
with a vocabulary in the hundreds of thousands, so they are taken a few rows at a time: no temporary
exceeds `_TEMPORARY_ELEMENTS`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

_TEMPORARY_ELEMENTS = 1 << 21  # 8 MiB of fp32: stays in a last-level cache
_INT32_BYTES = 4


def topk_log_softmax(
    output: Tensor,
    logits: Tensor,
    _logits_stride: int,
    token_ids: Tensor,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `sample.logprob._topk_log_softmax_kernel`: log-probabilities of chosen tokens.

    `output` [rows, k] fp32, `token_ids` [rows, k] int64. Sums in fp32 like the kernel, in another
    order: equal up to rounding, not bit for bit.
    """
    for rows in _row_slices(logits):
        part = logits[rows].float()
        chosen = part.gather(1, token_ids[rows])
        output[rows] = chosen - part.logsumexp(dim=1, keepdim=True)


def ranks(
    output: Tensor,
    logits: Tensor,
    _logits_stride: int,
    token_ids: Tensor,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `sample.logprob._ranks_kernel`: how many logits are at least the token's own.

    `output` [rows] int64 (1 is the most likely token), `token_ids` [rows] int64.
    """
    for rows in _row_slices(logits):
        part = logits[rows]
        own = part.gather(1, token_ids[rows].long().unsqueeze(1))
        output[rows] = (part >= own).sum(dim=1)


def fill_logprob_token_ids(
    output_ids: Tensor,
    _output_ids_stride: int,
    output_valid: Tensor,
    _output_valid_stride: int,
    sampled: Tensor,
    topk_ids: Tensor,
    _topk_ids_stride: int,
    expanded_slots: Tensor,
    custom_counts: Tensor,
    custom_ids: Tensor,
    *_later: Any,
    **constants: Any,
) -> None:
    """Stand for `sample.logprob._fill_logprob_token_ids_kernel`: which tokens get a logprob.

    Column 0 of `output_ids` [rows, 1+columns] int64 is the sampled token; the others are the
    request's own list (`custom_ids` [slots, limit] int32, `custom_counts` [slots] int32) or,
    without one, the row's `topk_ids` [rows, NUM_TOPK] int32. `output_valid` (bool, same shape)
    marks what was written; the rest is left as it was, zero.
    """
    num_topk = constants["NUM_TOPK"]
    ids, valid = output_ids.numpy(), output_valid.numpy()
    ids[:, 0] = sampled.numpy()
    valid[:, 0] = True
    slots = expanded_slots.numpy()
    counts = custom_counts.numpy()[slots]
    own = counts > 0
    columns = np.arange(ids.shape[1] - 1)
    filled = columns < np.where(own, counts, num_topk)[:, None]
    source = np.zeros(filled.shape, dtype=ids.dtype)
    source[~own, :num_topk] = topk_ids.numpy()[: len(ids)][~own, :num_topk] if num_topk else 0
    source[own] = custom_ids.numpy()[slots[own], : len(columns)]
    np.copyto(ids[:, 1:], source, where=filled)
    valid[:, 1:] |= filled


def prompt_logprob_token_ids(
    output: Tensor,
    query_start: Tensor,
    slots: Tensor,
    num_computed: Tensor,
    all_token_ids: Tensor,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `sample.prompt_logprob._prompt_logprobs_token_ids_kernel`: each row's next token.

    `output` [tokens] int64; a request's rows start at `num_computed` [slots] int32, and row p is
    scored on token p+1 of `all_token_ids` [slots, length] int32. The row that ends a full history
    has no next token and keeps what it held.
    """
    result, tokens = output.numpy(), all_token_ids.numpy()
    first = query_start.numpy()
    computed = num_computed.numpy()
    for request, slot in enumerate(slots.numpy().tolist()):
        begin, start = first[request], computed[slot] + 1
        following = tokens[slot, start : start + first[request + 1] - begin]
        result[begin : begin + len(following)] = following


def apply_grammar_bitmask(
    logits: Tensor,
    _logits_stride: int,
    mask_rows: Tensor,
    logits_start: Tensor,
    bitmask: Tensor,
    _bitmask_stride: int,
    vocab_size: int,
    *_later: Any,
    **constants: Any,
) -> None:
    """Stand for `structured_outputs._apply_grammar_bitmask_kernel`: forbid tokens, in place.

    Row i of `bitmask` [masks, ceil(vocabulary / 32)] int32 (bit set: allowed) belongs to position
    `mask_rows[i] % MASK_STRIDE` of request `mask_rows[i] // MASK_STRIDE`; positions a request has
    no logits for are skipped. `mask_rows` [masks] int32, `logits_start` [requests+1] int32.
    """
    stride = constants["MASK_STRIDE"]
    first = logits_start.numpy()
    bits = bitmask.numpy().view(np.uint8)
    for mask, row in enumerate(mask_rows.numpy()[: len(bits)].tolist()):
        request, position = divmod(row, stride)
        target = int(first[request]) + position
        if target < first[request + 1]:
            allowed = np.unpackbits(bits[mask], count=vocab_size, bitorder="little")
            logits[target].masked_fill_(torch.from_numpy(allowed == 0), float("-inf"))


def zero_kv_blocks(
    segment_addresses: Tensor,
    block_strides: Tensor,
    page_sizes: Tensor,
    block_ids: Tensor,
    *_later: Any,
    **_constants: Any,
) -> None:
    """Stand for `vllm.v1.worker.utils._zero_kv_blocks_kernel`: clear newly allocated KV blocks.

    Each of the [segments] is an address (uint64) with the distance between blocks and the part of a
    block to clear, both int64 in units of four bytes; `block_ids` is [blocks] int64.
    """
    blocks = block_ids.numpy().tolist()
    for address, stride, size in zip(
        segment_addresses.numpy().tolist(),
        block_strides.numpy().tolist(),
        page_sizes.numpy().tolist(),
        strict=True,
    ):
        for block in blocks:
            ctypes.memset(address + _INT32_BYTES * stride * block, 0, _INT32_BYTES * size)


def _row_slices(logits: Tensor) -> Iterator[slice]:
    rows = max(1, _TEMPORARY_ELEMENTS // max(1, logits.shape[1]))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)
