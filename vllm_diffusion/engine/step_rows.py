"""Records of a step's rows: whose they are, what they were granted for, and what came of them."""

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
    """Of N requests, on the device: whose rows a step runs."""

    slots: Tensor  # [N] integer
    seq_lens: Tensor  # [N] int32 or more of it, positions up to the last row of the step
    first: Tensor  # [N + 1] int32, where each request's rows behind logits begin; the last is R


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a step says of its N requests, as vLLM's sampler does."""

    tokens: Tensor  # [N, L] int32, in the first ``gained`` places
    gained: Tensor  # [N] int32
    rejected: Tensor  # [N] int32, rows that do not count as computed
    committed: CommittedCanvases | None = None  # None where no canvas ran


@dataclass(frozen=True, slots=True)
class GrantedRows:
    """What the rows of B requests are, each of which has rows for a canvas, [B] on the device."""

    slots: Tensor  # int64
    fused: Tensor  # bool, the slot's
    committed: Tensor  # int64, of all its rows, from the first one on; 0 where none commits
    idle: Tensor  # bool, no canvas runs: its place is a commit's, or it cannot stand there
    text: Tensor | None = None  # int64, rows granted in front of the canvas's; None for nowhere
    before: Tensor | None = None  # int64, so many rows further in front the canvas stands
    index: Tensor | None = None  # int64, which requests they are; None for all
    ran: Tensor | None = None  # int64, the slots that ``begin`` lets denoise, where it is done

    def placed(self, batch: CanvasBatch) -> CanvasBatch:
        """The canvases where they stand: behind the rows granted in front of them, or on those."""
        if self.before is None:
            return batch
        return replace(batch, position=batch.position - self.before[:, None])

    def begin(self, pool: CanvasPool, batch: CanvasBatch) -> CanvasBatch:
        """Let the canvases of a batch of these requests denoise; the last slot stands for no one.

        Args:
            pool: the canvases.
            batch: where each canvas stands, idle ones anywhere.
        """
        ran, nobody = self.ran, pool.num_slots - 1
        if ran is None:
            pool.causal[self.slots] &= ~self.fused
            pool.causal[nobody:].fill_(True)
            ran = torch.where(self.idle, nobody, self.slots)
        return replace(batch, slots=ran, idle=self.idle)
