"""From a step's requests to its canvases, and from what these give back to the requests.

vLLM's batch has its rows request by request; those behind logits are the rows of canvases. What is
here in torch is the definition, and what a CPU runs; ``canvases_kernels`` is the same for a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_diffusion.engine.committed import CommittedCanvases
from vllm_diffusion.engine.step_rows import Told
from vllm_diffusion.records import CanvasBatch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.engine.step_rows import StepRows
    from vllm_diffusion.records import Emission


def canvases_of(rows: StepRows, *, count: int, length: int) -> tuple[CanvasBatch, Tensor]:
    """The canvases of a step, and for each of their positions the hidden row it comes from.

    Args:
        rows: whose a canvas is where some are behind logits.
        count: B, canvases there are.
        length: L.

    Returns:
        The batch; [B, L] int64, beyond a canvas's width some row, which is not valid.
    """
    if rows.first.device.type == "cuda":
        return _kernels().canvases_of(rows, count=count, length=length)
    index = _decoding(rows)
    first = rows.first.long()
    width = (first[1:] - first[:-1])[index]
    offset = torch.arange(length, device=width.device)
    valid = offset < width[:, None]
    start = rows.seq_lens[index].long() - width
    return (
        CanvasBatch(
            slots=rows.slots[index],
            width=width,
            position=start[:, None] + offset,
            valid=valid,
        ),
        first[index][:, None] + torch.where(valid, offset, 0),
    )


def tell(pool: CanvasPool, rows: StepRows, emission: Emission | None, drafts: Tensor) -> Told:
    """What a step gives, by request; the next input of every request goes to ``drafts``.

    Args:
        pool: the canvases, one step on and those behind a prompt begun.
        rows: as for ``canvases_of``.
        emission: of the canvases; None where the step has none.
        drafts: [S, L or more] int64, changed in the slots of the requests.
    """
    if emission is not None and rows.first.device.type == "cuda":
        return _kernels().tell(pool, rows, emission, drafts)
    slots, length = rows.slots, pool.canvas_length
    drafts[slots, :length] = pool.tokens[slots]
    tokens = torch.zeros(len(slots), length, dtype=torch.int32, device=slots.device)
    gained = torch.zeros(len(slots), dtype=torch.int32, device=slots.device)
    rejected = torch.zeros_like(gained)
    if emission is None:
        return Told(tokens=tokens, gained=gained, rejected=rejected)
    index = _decoding(rows)
    tokens[index] = emission.tokens.int()
    gained[index] = emission.count.int()
    counts = torch.where(pool.fused[slots[index]], 0, emission.count)
    rejected[index] = ((rows.first[1:] - rows.first[:-1])[index] - counts).int()
    committed = CommittedCanvases.of(emission, index, len(slots))
    return Told(tokens=tokens, gained=gained, rejected=rejected, committed=committed)


def _decoding(rows: StepRows) -> Tensor:
    """[B] int64, the requests that have a canvas."""
    return (rows.first[1:] > rows.first[:-1]).nonzero()[:, 0]


def _kernels() -> Any:
    # Elsewhere there may be no Triton.
    from vllm_diffusion.engine import canvases_kernels

    return canvases_kernels
