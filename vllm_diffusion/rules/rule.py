"""What a decoding rule is: the one object that decides how a canvas is denoised.

    noise            what a new canvas holds, and a position that is not accepted
    temperature      the schedule
    soft_embeddings  which of the costly statistics it needs
    decide           what is accepted or revealed, what every position becomes, when a canvas is
                     finished, and what it then commits

A rule has no state. What it knows of a canvas is in the pool, its constants by slot among it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from vllm_diffusion.records import Noise

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.noise import CanvasNoise
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision


class Rule(ABC):
    """A decoding rule for canvases of one kind of noise."""

    def __init__(self, noise: CanvasNoise) -> None:
        self.noise = noise

    @abstractmethod
    def temperature(self, pool: CanvasPool, slots: Tensor) -> Tensor:
        """[B] fp32, by which the logits of the slots [B] int64 are divided in this step."""

    @abstractmethod
    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """What becomes of the canvases of a batch; changes nothing."""

    def keyed(
        self, pool: CanvasPool, batch: CanvasBatch, factor: Tensor | None = None
    ) -> tuple[Tensor, Noise]:
        """Temperature [R] fp32 and noise key of all R = B * L rows of a batch.

        Args:
            pool: the canvases' state.
            batch: of B canvases.
            factor: [B] fp32, of the schedule's temperature; None for 1.
        """
        slots, length = batch.slots, batch.position.shape[1]
        temperature = self.temperature(pool, slots)
        if factor is not None:
            temperature = temperature * factor
        noise = Noise(
            seed=pool.seed[slots].repeat_interleave(length, dim=0),
            position=batch.position.flatten(),
            step=pool.step[slots].repeat_interleave(length),
        )
        return temperature.repeat_interleave(length), noise

    def soft_embeddings(
        self,
        pool: CanvasPool,  # noqa: ARG002 - a rule that conditions on something else needs neither
        slots: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor | None, bool]:
        """How much of the soft embedding the canvases need, see ``head.rows.Rows``.

        Returns:
            [B] int64 number of ids by canvas, -1 for no soft embedding; None: all ids, everywhere.
            Whether every request that holds a slot asks for a limited number.
        """
        return None, False
