"""Map a step's requests to canvases, and the canvases' emissions back to requests.

vLLM's batch holds its rows request by request; the rows it computes logits for are canvas rows.
This torch code is the definition and runs on CPUs; ``canvases_kernels`` is the same for GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_diffusion import grid
from vllm_diffusion.engine.committed import CommittedCanvases
from vllm_diffusion.engine.step_rows import StepOutput
from vllm_diffusion.records import CanvasBatch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.engine.step_rows import StepRows
    from vllm_diffusion.family import Family
    from vllm_diffusion.records import Emission


def canvases_of(rows: StepRows, *, count: int, length: int) -> tuple[CanvasBatch, Tensor]:
    """The canvases of a step, and the hidden row of each of their positions.

    Args:
        rows: the step's rows; a request has a canvas if it has rows with logits.
        count: B, number of canvases.
        length: L.

    Returns:
        The batch, and [B, L] int64 indices of hidden rows, arbitrary beyond a canvas's width.
    """
    if rows.first.device.type == "cuda":
        return _kernels().canvases_of(rows, count=count, length=length)
    index = _decoding(rows)
    first = rows.first.long()
    drafted = (first[1:] - first[:-1])[index]
    width = torch.minimum(drafted, rows.widest[rows.slots[index]])
    offset = torch.arange(length, device=width.device)
    valid = offset < width[:, None]
    start = rows.seq_lens[index].long() - drafted
    return (
        CanvasBatch(
            slots=rows.slots[index],
            width=width,
            position=start[:, None] + offset,
            valid=valid,
        ),
        first[index][:, None] + torch.where(valid, offset, 0),
    )


def step_output(
    family: Family, pool: CanvasPool, rows: StepRows, emission: Emission | None, drafts: Tensor
) -> StepOutput:
    """The output of a step by request; writes every request's next input to ``drafts``.

    Args:
        family: of the model, which says what counts as computed, see ``grid``.
        pool: the canvases after the step, including those begun after a prompt.
        rows: as for ``canvases_of``.
        emission: the canvases' emission; None if the step has no canvases.
        drafts: [S, L or more] int64, written in the slots of the requests.
    """
    if emission is not None and rows.first.device.type == "cuda":
        return _kernels().step_output(family, pool, rows, emission, drafts)
    slots, length = rows.slots, pool.canvas_length
    drafts[slots, :length] = pool.tokens[slots]
    tokens = torch.zeros(len(slots), length, dtype=torch.int32, device=slots.device)
    gained = torch.zeros(len(slots), dtype=torch.int32, device=slots.device)
    if emission is None:
        rejected = _rejected(family, rows, gained, gained)
        return StepOutput(tokens=tokens, gained=gained, rejected=rejected)
    index = _decoding(rows)
    tokens[index] = emission.tokens.int()
    gained[index] = emission.count.int()
    committed = CommittedCanvases.of(emission, index, len(slots))
    separate = torch.where(pool.fused[slots], 0, gained)
    rejected = _rejected(family, rows, gained, separate)
    return StepOutput(tokens=tokens, gained=gained, rejected=rejected, committed=committed)


def _rejected(family: Family, rows: StepRows, gained: Tensor, committed: Tensor) -> Tensor:
    """[N] int32, rows that do not count as computed; more than the step had take back others.

    Args:
        family: of the model.
        rows: the step's rows.
        gained: [N] int32, tokens that leave.
        committed: [N] int32, tokens that a commit of its own has committed, 0 for none.
    """
    upto = rows.seq_lens[: len(rows.slots)]
    drafted = rows.first[1:] - rows.first[:-1]
    known = upto - drafted
    kept = torch.where(
        drafted > 0,
        grid.kept_of_canvas(family, known=known, reused=rows.reuses[rows.slots] & (gained == 0)),
        grid.kept_of_text(family, upto=upto, known=rows.text_end[rows.slots]),
    )
    counted = grid.kept_of_commit(family, known=known, count=committed)
    return (upto - torch.where(committed > 0, counted, kept)).int()


def _decoding(rows: StepRows) -> Tensor:
    """[B] int64, indices of the requests that have a canvas."""
    return (rows.first[1:] > rows.first[:-1]).nonzero()[:, 0]


def _kernels() -> Any:
    # Imported here because other hosts may have no Triton.
    from vllm_diffusion.engine import canvases_kernels

    return canvases_kernels
