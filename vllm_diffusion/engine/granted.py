"""In the worker: what the rows of a step are, where they were granted before that was known.

See ``engine.fusion`` for what may be granted, and who counts what. What is here in torch is the
definition, and what a CPU runs; ``granted_kernels`` has what every step of a GPU needs of it.
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
    """[num_reqs] rows in front of each request's canvas rows, 0 for prompts; on the host."""
    rows = input_batch.num_scheduled_tokens[: input_batch.num_reqs]
    if (drafts := input_batch.num_draft_tokens_per_req) is None:
        return np.zeros_like(rows)  # a profiling run
    return np.where(input_batch.is_prefilling_np[: input_batch.num_reqs], 0, rows - drafts)


def look(
    pool: CanvasPool, slots: Tensor, text: Tensor | None = None, *, begin: bool = False
) -> GrantedRows:
    """Look at slots as they are before the forward, and behind it until they begin.

    Args:
        pool: the canvases.
        slots: [B] int64.
        text: see ``GrantedRows``.
        begin: a GPU does what ``GrantedRows.begin`` does to the pool in the same launch.
    """
    if slots.device.type == "cuda":
        return _kernels().look(pool, slots, text, begin=begin)
    fused = pool.fused[slots]
    waits = pool.causal[slots] & fused
    committed = torch.where(waits, pool.count[slots], 0)
    if text is None:
        return GrantedRows(slots, fused, committed, idle=waits)
    before = torch.where(waits, 0, text)
    return GrantedRows(slots, fused, committed, waits & (committed != text), text, before)


def granted_rows(pool: CanvasPool, input_batch: InputBatch, widths: np.ndarray) -> GrantedRows:
    """What a step's rows are; takes in the commits that have no rows for a canvas beside them.

    Args:
        pool: the canvases, as they were before the forward.
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
    return replace(look(pool, slots, text, begin=True), index=index)


def settle(
    rows: GrantedRows, pool: CanvasPool, emission: Emission, rejected: Tensor, drafts: Tensor
) -> None:
    """Take in which canvases are now to be committed, and which rows did not count.

    Args:
        rows: what they were granted for.
        pool: the canvases, one step on.
        emission: of this step.
        rejected: [num_reqs] int32, of a canvas's rows; becomes that of all.
        drafts: [S, L or more], what the next rows read if they are as many as a canvas's.
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
    # Elsewhere there may be no Triton.
    from vllm_diffusion.engine import granted_kernels

    return granted_kernels


def _sent(values: np.ndarray, pool: CanvasPool) -> Tensor:
    """[N] int64 on the device; nobody waits for the copy."""
    return async_tensor_h2d(values.astype(np.int64), device=pool.device)


def canvas_and_padding(input_batch: InputBatch, pool: CanvasPool) -> tuple[Tensor, Tensor]:
    """[num_reqs] int64: rows of every request's canvas in this forward, and rows behind it."""
    text = _sent(text_rows(input_batch), pool)
    granted = look(pool, input_batch.idx_mapping, text)
    assert granted.before is not None
    drafts = torch.as_tensor(input_batch.num_draft_tokens_per_req, dtype=torch.int64)
    drafts = drafts.to(pool.device)
    nowhere = granted.idle | (pool.causal[granted.slots] & (granted.committed == 0))
    return torch.where(nowhere, 0, drafts), torch.where(drafts > 0, granted.before, 0)


def place_rows(
    input_batch: InputBatch, pool: CanvasPool, req_states: RequestState, *, foreseen: bool
) -> Tensor:
    """Fill in the tokens of requests with rows in front of their canvas's; who has no canvas.

    Moves the batch's ``logits_indices`` to where the canvases are.

    Returns:
        [S] bool, slots whose rows behind logits belong to no canvas.
    """
    text = text_rows(input_batch)
    drafts = input_batch.num_draft_tokens_per_req
    if drafts is None or not text.any():
        return pool.causal

    at = np.flatnonzero(text)
    first, front, behind = input_batch.query_start_loc_np[at], text[at], drafts[at]
    if pool.device.type == "cuda":
        told = np.stack([at, first, front, behind, input_batch.cu_num_logits_np[at]])
        known = req_states.all_token_ids.gpu
        longest = int((front + behind).max())
        return _kernels().place_rows(
            _sent(told, pool), input_batch, pool, known, longest=longest, foreseen=foreseen
        )
    places, offsets = _sent(at, pool), [np.arange(rows) for rows in (*front, *behind)]
    owner = _sent(np.repeat(np.arange(at.size), front), pool)
    offset = _sent(np.concatenate(offsets[: at.size]), pool)
    rows = _sent(np.repeat(first, front), pool) + offset
    index = input_batch.idx_mapping[places]
    ahead = _sent(front, pool)
    granted = look(pool, index, ahead)
    # Where nothing is foreseen rows in front of a canvas's are text.
    committed, before = (granted.committed, granted.before) if foreseen else (ahead, ahead * 0)
    assert before is not None
    # In front of a canvas: the text that is committed, or the canvas itself.
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
