"""``granted`` as Triton kernels, one program per request. Imported only on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from vllm_diffusion.engine.step_rows import GrantedRows

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import Emission

_ROWS: Final = 256  # rows of a request that one program writes


def inspect_slots(
    pool: CanvasPool, slots: Tensor, text: Tensor | None, *, begin: bool = False
) -> GrantedRows:
    """See ``granted.inspect_slots``."""
    committed = torch.empty_like(slots)
    fused = torch.empty_like(slots, dtype=torch.bool)
    rows = GrantedRows(
        slots=slots,
        fused=fused,
        committed=committed,
        idle=torch.empty_like(fused),
        text=text,
        before=None if text is None else torch.empty_like(committed),
        ran=torch.empty_like(slots) if begin else None,
    )
    if slots.shape[0]:
        _inspect_slots[(slots.shape[0],)](
            slots,
            pool.causal,
            pool.fused,
            pool.count,
            text,
            rows.fused,
            rows.committed,
            rows.idle,
            rows.before,
            rows.ran,
            pool.num_slots - 1,
        )
    return rows


def settle(
    rows: GrantedRows, pool: CanvasPool, emission: Emission, rejected: Tensor, drafts: Tensor
) -> None:
    """See ``granted.settle``."""
    length = emission.tokens.shape[1]
    _end[(rows.slots.shape[0],)](
        rows.slots,
        rows.fused,
        rows.committed,
        rows.text,
        rows.index,
        emission.count,
        emission.tokens,
        pool.tokens,
        pool.causal,
        rejected,
        drafts,
        drafts.stride(0),
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
    )


def place_rows(
    layout: Tensor,
    input_batch: InputBatch,
    pool: CanvasPool,
    known: Tensor,
    *,
    longest: int,
    foreseen: bool,
) -> Tensor:
    """See ``granted.place_rows``.

    Args:
        layout: [5, A] int64, of the A requests with rows before their canvas: index in the batch,
            first row, rows before the canvas, rows after those, and index of their first logit.
        input_batch: the step's batch.
        pool: the canvases.
        known: [S, max_model_len] int32, the text of every slot.
        longest: most rows of any request.
        foreseen: see ``granted.place_rows``.
    """
    nowhere = pool.causal.clone()
    length = pool.tokens.shape[1]
    _place[(layout.shape[1], triton.cdiv(longest, _ROWS))](
        layout,
        layout.shape[1],
        input_batch.idx_mapping,
        input_batch.seq_lens,
        pool.causal,
        pool.fused,
        pool.count,
        pool.tokens,
        known,
        known.stride(0),
        input_batch.input_ids,
        input_batch.logits_indices,
        nowhere,
        FORESEEN=foreseen,
        LENGTH=length,
        BLOCK=_ROWS,
    )
    return nowhere


@triton.jit(do_not_specialize=["nobody"])
def _inspect_slots(
    slots: tl.tensor,
    causals: tl.tensor,
    fuseds: tl.tensor,
    counts: tl.tensor,
    text: tl.tensor,
    out_fused: tl.tensor,
    out_committed: tl.tensor,
    out_idle: tl.tensor,
    out_before: tl.tensor,
    ran: tl.tensor,
    nobody: tl.tensor,
) -> None:
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    fused = tl.load(fuseds + slot) != 0
    causal = tl.load(causals + slot) != 0
    waits = causal & fused
    committed = tl.where(waits, tl.load(counts + slot), 0)
    idle = waits
    if text is not None:
        front = tl.load(text + row)
        idle = waits & (committed != front)
        tl.store(out_before + row, tl.where(waits, 0, front))
    tl.store(out_fused + row, fused)
    tl.store(out_committed + row, committed)
    tl.store(out_idle + row, idle)
    if ran is not None:
        tl.store(causals + slot, causal & ~fused)
        tl.store(ran + row, tl.where(idle, nobody.to(tl.int64), slot))
        if row == 0:
            tl.store(causals + nobody, True)


@triton.jit
def _end(
    slots: tl.tensor,
    fuseds: tl.tensor,
    committeds: tl.tensor,
    text: tl.tensor,
    index: tl.tensor,
    counts: tl.tensor,
    emitted: tl.tensor,
    tokens: tl.tensor,
    causals: tl.tensor,
    rejecteds: tl.tensor,
    drafts: tl.tensor,
    stride: tl.tensor,
    LENGTH: tl.constexpr,  # noqa: N803 - Triton's custom for compile-time arguments
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    given = (tl.load(counts + row) > 0) & (tl.load(fuseds + row) != 0)
    tl.store(causals + slot, (tl.load(causals + slot) != 0) | given)
    offset = tl.arange(0, BLOCK)
    there = offset < LENGTH
    said = tl.load(emitted + row * LENGTH + offset, mask=there, other=0)
    next_input = tl.load(tokens + slot * LENGTH + offset, mask=there, other=0)
    tl.store(drafts + slot * stride + offset, tl.where(given, said, next_input), mask=there)
    more = -tl.load(committeds + row)
    if text is not None:
        more += tl.load(text + row)
    request = row
    if index is not None:
        request = tl.load(index + row)
    rejected = tl.load(rejecteds + request)
    tl.store(rejecteds + request, rejected + more.to(rejected.dtype))


@triton.jit(do_not_specialize=["requests"])
def _place(
    layout: tl.tensor,
    requests: tl.tensor,
    mapping: tl.tensor,
    lens: tl.tensor,
    causals: tl.tensor,
    fuseds: tl.tensor,
    counts: tl.tensor,
    tokens: tl.tensor,
    known: tl.tensor,
    known_stride: tl.tensor,
    input_ids: tl.tensor,
    logits: tl.tensor,
    nowhere: tl.tensor,
    FORESEEN: tl.constexpr,  # noqa: N803
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    layout += tl.program_id(0)
    place, first = tl.load(layout), tl.load(layout + requests)
    front, behind = tl.load(layout + 2 * requests), tl.load(layout + 3 * requests)
    slot = tl.load(mapping + place).to(tl.int64)
    waits = (tl.load(causals + slot) != 0) & (tl.load(fuseds + slot) != 0)
    committed = tl.where(waits, tl.load(counts + slot), 0)
    tl.store(nowhere + slot, waits & (committed != front))
    if FORESEEN:
        before = tl.where(waits, 0, front)
        spoken = tl.where(committed > 0, front, 0)
    else:
        before = front * 0
        spoken = front
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there, in_front, text = offset < front + behind, offset < front, offset < spoken
    start = tl.load(lens + place) - (front + behind)
    said = tl.load(known + slot * known_stride + start + offset, mask=text, other=0)
    inside = tl.where(in_front, tl.minimum(offset, LENGTH - 1), offset - front)
    canvas = tl.load(tokens + slot * LENGTH + inside, mask=there, other=0)
    token = tl.where(text, said.to(tl.int64), canvas)
    tl.store(input_ids + first + offset, token.to(input_ids.dtype.element_ty), mask=there)
    moved = logits + tl.load(layout + 4 * requests) + offset - front
    row = tl.load(moved, mask=there & (offset >= front), other=0) - before
    tl.store(moved, row.to(logits.dtype.element_ty), mask=there & (offset >= front))
