"""``granted`` as Triton kernels: a program a request. Imported on a GPU alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_diffusion.engine.granted import GrantedRows

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import Emission


def among(
    pool: CanvasPool, slots: Tensor, text: Tensor | None, *, begin: bool = False
) -> GrantedRows:
    """See ``GrantedRows.among``."""
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
        _look[(slots.shape[0],)](
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


def end(
    rows: GrantedRows, pool: CanvasPool, emission: Emission, rejected: Tensor, drafts: Tensor
) -> None:
    """See ``GrantedRows.end``."""
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


@triton.jit(do_not_specialize=["nobody"])
def _look(
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
