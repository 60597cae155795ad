"""``canvases`` as Triton kernels: one program per request, no device sync.

Imported only on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_diffusion.engine.committed import CommittedCanvases
from vllm_diffusion.engine.step_rows import StepOutput
from vllm_diffusion.family import Text
from vllm_diffusion.records import CanvasBatch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.engine.step_rows import StepRows
    from vllm_diffusion.family import Family
    from vllm_diffusion.records import Emission

_COUNTED = tl.constexpr(128)  # requests read per iteration


def canvases_of(rows: StepRows, *, count: int, length: int) -> tuple[CanvasBatch, Tensor]:
    """See ``canvases.canvases_of``."""
    slots = torch.empty(count, dtype=torch.int64, device=rows.first.device)
    position = slots.new_empty(count, length)
    batch = CanvasBatch(
        slots=slots,
        width=torch.empty_like(slots),
        position=position,
        valid=torch.empty_like(position, dtype=torch.bool),
    )
    places = torch.empty_like(position)
    _lay_out_canvas[(len(rows.slots),)](
        rows.first,
        rows.slots,
        rows.seq_lens,
        rows.widest,
        batch.slots,
        batch.width,
        batch.position,
        batch.valid,
        places,
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
    )
    return batch, places


def step_output(
    family: Family, pool: CanvasPool, rows: StepRows, emission: Emission, drafts: Tensor
) -> StepOutput:
    """See ``canvases.step_output``."""
    num, length = len(rows.slots), pool.canvas_length
    gained = torch.empty(num, dtype=torch.int32, device=drafts.device)
    output = StepOutput(
        tokens=gained.new_empty(num, length),
        gained=gained,
        rejected=torch.empty_like(gained),
        committed=CommittedCanvases(gained.new_empty(num, 3)),
    )
    assert output.committed is not None
    _write_output[(num,)](
        rows.first,
        rows.slots,
        rows.seq_lens,
        rows.text_end,
        rows.reuses,
        emission.tokens,
        emission.count,
        emission.steps,
        emission.reason,
        emission.entropy.view(torch.int32),
        pool.fused,
        pool.tokens,
        drafts,
        drafts.stride(0),
        output.tokens,
        output.gained,
        output.rejected,
        output.committed.facts,
        LENGTH=length,
        BLOCK=triton.next_power_of_2(length),
        GRID=family.block if family.text is Text.BLOCK else 1,
        WHOLE=family.text is Text.WHOLE,
    )
    return output


@triton.jit
def _canvases_before(first: tl.tensor, request: tl.tensor) -> tl.tensor:
    """Number of requests before this one that have a canvas."""
    count = request * 0
    for start in range(0, request, _COUNTED):
        other = start + tl.arange(0, _COUNTED)
        before = other < request
        begin = tl.load(first + other, mask=before, other=0)
        count += tl.sum((tl.load(first + other + 1, mask=before, other=0) > begin).to(tl.int32))
    return count


@triton.jit
def _lay_out_canvas(
    first: tl.tensor,
    request_slots: tl.tensor,
    seq_lens: tl.tensor,
    widest: tl.tensor,
    slots: tl.tensor,
    widths: tl.tensor,
    positions: tl.tensor,
    valids: tl.tensor,
    places: tl.tensor,
    LENGTH: tl.constexpr,  # noqa: N803 - Triton's way of writing constants
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    request = tl.program_id(0)
    begin = tl.load(first + request).to(tl.int64)
    drafted = tl.load(first + request + 1) - begin
    if drafted > 0:
        canvas = _canvases_before(first, request)
        offset = tl.arange(0, BLOCK)
        there = offset < LENGTH
        slot = tl.load(request_slots + request).to(tl.int64)
        width = tl.minimum(drafted, tl.load(widest + slot))
        valid = offset < width
        row = canvas * LENGTH + offset
        start = tl.load(seq_lens + request) - drafted
        tl.store(slots + canvas, slot)
        tl.store(widths + canvas, width)
        tl.store(positions + row, start + offset, mask=there)
        tl.store(valids + row, valid, mask=there)
        tl.store(places + row, begin + tl.where(valid, offset, 0), mask=there)


@triton.jit
def _write_output(
    first: tl.tensor,
    request_slots: tl.tensor,
    seq_lens: tl.tensor,
    text_ends: tl.tensor,
    reuses: tl.tensor,
    emitted_tokens: tl.tensor,
    emitted_counts: tl.tensor,
    emitted_steps: tl.tensor,
    emitted_reasons: tl.tensor,
    emitted_entropies: tl.tensor,
    fuseds: tl.tensor,
    pool_tokens: tl.tensor,
    drafts: tl.tensor,
    draft_stride: tl.tensor,
    tokens: tl.tensor,
    gained: tl.tensor,
    rejected: tl.tensor,
    facts: tl.tensor,
    LENGTH: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    GRID: tl.constexpr,  # noqa: N803
    WHOLE: tl.constexpr,  # noqa: N803
) -> None:
    request = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    there = offset < LENGTH
    slot = tl.load(request_slots + request).to(tl.int64)
    next_input = tl.load(pool_tokens + slot * LENGTH + offset, mask=there, other=0)
    tl.store(drafts + slot * draft_stride + offset, next_input, mask=there)

    drafted = tl.load(first + request + 1) - tl.load(first + request)
    decodes = drafted > 0
    canvas = _canvases_before(first, request)
    its = offset < tl.where(decodes, LENGTH, 0)
    said = tl.load(emitted_tokens + canvas * LENGTH + offset, mask=its, other=0)
    count = tl.load(emitted_counts + canvas, mask=decodes, other=0).to(tl.int32)
    fused = tl.load(fuseds + slot) != 0
    tl.store(tokens + request * LENGTH + offset, said.to(tl.int32), mask=there)
    tl.store(gained + request, count)
    # As ``grid`` has it: a step keeps its text up to a point of the grid, a commit all of it.
    upto = tl.load(seq_lens + request)
    if WHOLE:
        reused = (count == 0) & (tl.load(reuses + slot) != 0)
        again = tl.where(upto >= tl.load(text_ends + slot), 0, upto)
        kept = tl.where(decodes, tl.where(reused, upto - drafted, 0), again)
    else:
        final = upto - drafted + tl.where(fused, 0, count)
        kept = final - final % GRID
    tl.store(rejected + request, upto - kept)
    fact = facts + 3 * request
    tl.store(fact, tl.load(emitted_steps + canvas, mask=decodes, other=0).to(tl.int32))
    tl.store(fact + 1, tl.load(emitted_reasons + canvas, mask=decodes, other=0).to(tl.int32))
    tl.store(fact + 2, tl.load(emitted_entropies + canvas, mask=decodes, other=0))
