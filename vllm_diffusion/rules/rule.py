"""The interface of a decoding rule: the one object that decides how a canvas is denoised.

    noise            tokens of a new canvas and of rejected positions
    temperature      the schedule
    soft_embeddings  how much of the costliest statistic it needs
    probabilities    which of the statistics it needs that few rules do
    decide           which positions are accepted or revealed, the next input, whether a canvas is
                     finished, and what it then commits

A rule has no state. The state of a canvas, its constants included, is in the pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from vllm_diffusion.records import Noise

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.noise import CanvasNoise
    from vllm_diffusion.family import Family
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision


class Rule(ABC):
    """A decoding rule on one kind of noise."""

    def __init__(self, noise: CanvasNoise) -> None:
        self.noise = noise

    @classmethod
    def of(cls, family: Family, noise: CanvasNoise) -> Self:
        """The rule for a family on its noise."""
        del family  # a rule may need nothing more of it
        return cls(noise)

    @abstractmethod
    def temperature(self, pool: CanvasPool, slots: Tensor) -> Tensor:
        """[B] fp32, divisor of the logits in this step, for slots [B] int64."""

    @abstractmethod
    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """The decision for the canvases of a batch; changes no state."""

    def keyed(
        self, pool: CanvasPool, batch: CanvasBatch, factor: Tensor | None = None
    ) -> tuple[Tensor, Noise]:
        """Temperature [R] fp32 and noise key of all R = B * L rows of a batch.

        Args:
            pool: the canvases' state.
            batch: of B canvases.
            factor: [B] fp32, multiplies the schedule's temperature; None for 1.
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
        pool: CanvasPool,  # noqa: ARG002 - a rule may need neither argument
        slots: Tensor,  # noqa: ARG002
    ) -> tuple[Tensor | None, bool]:
        """How much of the soft embedding the canvases need, see ``head.rows.Rows``.

        Returns:
            [B] int64, number of ids per canvas, -1 for no soft embedding; None for all ids in all
            canvases. And whether every request in the pool asks for a limited number.
        """
        return None, False

    def probabilities(self, pool: CanvasPool) -> tuple[bool, bool]:  # noqa: ARG002
        """Whether some request in the pool needs ``sample_prob``, and ``own_prob``."""
        return False, False
