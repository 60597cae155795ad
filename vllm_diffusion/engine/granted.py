"""In the worker: what rows are that were granted before the previous step's outcome was known.

See ``engine.fusion`` for what may be granted and how it is counted. This torch code is the
definition and runs on CPUs; ``granted_kernels`` has the parts that every step on a GPU needs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_diffusion.engine.step_rows import GrantedRows

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import Emission


def text_rows(input_batch: InputBatch) -> np.ndarray:
    """[num_reqs], rows before each request's canvas rows, 0 for prompts; on the host."""
    rows = input_batch.num_scheduled_tokens[: input_batch.num_reqs]
    if (drafts := input_batch.num_draft_tokens_per_req) is None:
        return np.zeros_like(rows)  # a profiling run
    return np.where(input_batch.is_prefilling_np[: input_batch.num_reqs], 0, rows - drafts)


def inspect_slots(
    pool: CanvasPool, slots: Tensor, text: Tensor | None = None, *, begin: bool = False
) -> GrantedRows:
    """Read the state of the slots, at any time before their canvases begin to denoise.

    Args:
        pool: the canvases.
        slots: [B] int64.
        text: see ``GrantedRows``.
        begin: on a GPU, also do to the pool what ``GrantedRows.begin`` does, in the same launch.
    """
    if slots.device.type == "cuda":
        return _kernels().inspect_slots(pool, slots, text, begin=begin)
    fused = pool.fused[slots]
    waits = pool.causal[slots] & fused
    committed = torch.where(waits, pool.count[slots], 0)
    if text is None:
        return GrantedRows(slots, fused, committed, idle=waits)
    before = torch.where(waits, 0, text)
    return GrantedRows(slots, fused, committed, waits & (committed != text), text, before)


def granted_rows(pool: CanvasPool, input_batch: InputBatch, widths: np.ndarray) -> GrantedRows:
    """What a step's rows are; also records commits that run without rows for a canvas.

    Args:
        pool: the canvases before the forward.
        input_batch: the step's batch.
        widths: [num_reqs], rows for a canvas.
    """
    slots, front = input_batch.idx_mapping, text_rows(input_batch)
    if (alone := np.flatnonzero(front * (widths == 0))).size:
        pool.causal.index_fill_(0, slots[_sent(alone, pool)], value=False)
    index, decoding = None, np.flatnonzero(widths)
    if decoding.size < widths.size:
        index = _sent(decoding, pool)
        slots = slots[index]
    front = front[decoding]
    text = _sent(front, pool) if front.any() else None
    return replace(inspect_slots(pool, slots, text, begin=True), index=index)


def settle(
    rows: GrantedRows, pool: CanvasPool, emission: Emission, rejected: Tensor, drafts: Tensor
) -> None:
    """Record which canvases are now to be committed and which rows do not count as computed.

    Args:
        rows: what the rows of the step are.
        pool: the canvases after the step.
        emission: emission of this step.
        rejected: [num_reqs] int32, rejected canvas rows; updated to include all other rows.
        drafts: [S, L or more], input of the next rows if there are as many as a canvas has.
    """
    if rows.slots.device.type == "cuda":
        _kernels().settle(rows, pool, emission, rejected, drafts)
        return
    given = (emission.count > 0) & rows.fused
    pool.causal[rows.slots] |= given
    said = torch.where(given[:, None], emission.tokens, pool.tokens[rows.slots])
    drafts[rows.slots, : said.shape[1]] = said
    more = -rows.committed if rows.text is None else rows.text - rows.committed
    if rows.index is None:
        rejected += more
    else:
        rejected[rows.index] += more.to(rejected.dtype)


@cache
def _kernels() -> Any:
    # Imported here because other hosts may have no Triton.
    from vllm_diffusion.engine import granted_kernels

    return granted_kernels


def _sent(values: np.ndarray, pool: CanvasPool) -> Tensor:
    """[N] int64 on the device, copied asynchronously."""
    return async_tensor_h2d(values.astype(np.int64), device=pool.device)


def canvas_and_padding(input_batch: InputBatch, pool: CanvasPool) -> tuple[Tensor, Tensor]:
    """[num_reqs] int64 each: rows of every request's canvas in this forward, and rows after it."""
    text = _sent(text_rows(input_batch), pool)
    granted = inspect_slots(pool, input_batch.idx_mapping, text)
    assert granted.before is not None
    drafts = torch.as_tensor(input_batch.num_draft_tokens_per_req, dtype=torch.int64)
    drafts = drafts.to(pool.device)
    nowhere = granted.idle | (pool.causal[granted.slots] & (granted.committed == 0))
    return torch.where(nowhere, 0, drafts), torch.where(drafts > 0, granted.before, 0)


def place_rows(
    input_batch: InputBatch, pool: CanvasPool, req_states: RequestState, *, foreseen: bool
) -> Tensor:
    """Write the input tokens of requests that have rows before their canvas rows.

    Also moves the batch's ``logits_indices`` to where the canvases are.

    Returns:
        [S] bool, slots whose rows with logits belong to no canvas.
    """
    text = text_rows(input_batch)
    drafts = input_batch.num_draft_tokens_per_req
    if drafts is None or not text.any():
        return pool.causal

    at = np.flatnonzero(text)
    first, front, behind = input_batch.query_start_loc_np[at], text[at], drafts[at]
    if pool.device.type == "cuda":
        layout = np.stack([at, first, front, behind, input_batch.cu_num_logits_np[at]])
        known = req_states.all_token_ids.gpu
        longest = int((front + behind).max())
        return _kernels().place_rows(
            _sent(layout, pool), input_batch, pool, known, longest=longest, foreseen=foreseen
        )
    places, offsets = _sent(at, pool), [np.arange(rows) for rows in (*front, *behind)]
    owner = _sent(np.repeat(np.arange(at.size), front), pool)
    offset = _sent(np.concatenate(offsets[: at.size]), pool)
    rows = _sent(np.repeat(first, front), pool) + offset
    index = input_batch.idx_mapping[places]
    ahead = _sent(front, pool)
    granted = inspect_slots(pool, index, ahead)
    # Unless rows are granted ahead, those before a canvas are always text.
    committed, before = (granted.committed, granted.before) if foreseen else (ahead, ahead * 0)
    assert before is not None
    # Before a canvas's rows: the text being committed, or the canvas itself.
    start = input_batch.seq_lens[places].long() - _sent(front + behind, pool)
    known = req_states.all_token_ids.gpu[index[owner], start[owner] + offset].long()
    canvas = pool.tokens[index]
    commits = committed[owner] > 0
    inside = offset.clamp(max=canvas.shape[1] - 1)
    tokens = torch.where(commits, known, canvas[owner, inside])
    input_batch.input_ids[rows] = tokens.to(input_batch.input_ids.dtype)
    nowhere = pool.causal.clone()
    nowhere[index] = granted.idle
    if not behind.any():
        return nowhere
    owner = _sent(np.repeat(np.arange(at.size), behind), pool)
    offset = _sent(np.concatenate(offsets[at.size :]), pool)
    rows = _sent(np.repeat(first + front, behind), pool) + offset
    input_batch.input_ids[rows] = canvas[owner, offset].to(input_batch.input_ids.dtype)
    logits = _sent(np.repeat(input_batch.cu_num_logits_np[at], behind), pool) + offset
    input_batch.logits_indices[logits] -= before[owner]
    return nowhere
