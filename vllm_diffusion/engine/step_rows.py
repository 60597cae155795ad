"""Records of a step's rows: their requests, what they were granted for, and the output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.engine.committed import CommittedCanvases
    from vllm_diffusion.records import CanvasBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRows:
    """The rows of a step's N requests, on the device."""

    slots: Tensor  # [N] integer
    seq_lens: Tensor  # [N or more] int32, sequence length including the rows of the step
    first: Tensor  # [N + 1] int32, first row with logits of each request; the last is R
    text_end: Tensor  # [S] int32 by slot, end of the text that its request came with
    widest: Tensor  # [S] int64 by slot, rows of a canvas; drafts behind them are its horizon
    reuses: Tensor  # [S] bool by slot, its text is kept while a canvas goes on, see ``grid``


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Output of a step for its N requests, as vLLM's sampler returns it."""

    tokens: Tensor  # [N, L] int32, valid in the first ``gained`` places
    gained: Tensor  # [N] int32
    rejected: Tensor  # [N] int32, rows that do not count as computed, see ``grid``
    committed: CommittedCanvases | None = None  # None where no canvas ran


@dataclass(frozen=True, slots=True)
class GrantedRows:
    """What the rows of B requests with rows for a canvas are; tensors [B] on the device."""

    slots: Tensor  # int64
    fused: Tensor  # bool, the slot has fused commits
    committed: Tensor  # int64, number of its first rows that commit; 0 for none
    idle: Tensor  # bool, no canvas runs: its rows commit, or there is no room for it
    text: Tensor | None = None  # int64, rows granted before the canvas's; None for none anywhere
    before: Tensor | None = None  # int64, rows by which the canvas starts earlier than its grant
    index: Tensor | None = None  # int64, indices of the requests; None for all
    ran: Tensor | None = None  # int64, slots that ``begin`` lets denoise, if it was done already

    def placed(self, batch: CanvasBatch) -> CanvasBatch:
        """The canvases at their positions: after the rows granted before them, or on those rows."""
        if self.before is None:
            return batch
        return replace(batch, position=batch.position - self.before[:, None])

    def begin(self, pool: CanvasPool, batch: CanvasBatch) -> CanvasBatch:
        """Let the canvases of these requests denoise; idle ones run in the last slot, a dummy.

        Args:
            pool: the canvases.
            batch: position of each canvas, arbitrary for idle ones.
        """
        ran, nobody = self.ran, pool.num_slots - 1
        if ran is None:
            pool.causal[self.slots] &= ~self.fused
            pool.causal[nobody:].fill_(True)
            ran = torch.where(self.idle, nobody, self.slots)
        return replace(batch, slots=ran, idle=self.idle)
