"""Rules for tests: the published one with another decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_diffusion.denoise.noise import UniformNoise
from vllm_diffusion.rules.entropy_bound import EntropyBound

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision


class Deciding(EntropyBound):
    """The published rule, but for what a function makes of its decision."""

    def __init__(
        self,
        change: Callable[[Decision, CanvasPool, CanvasBatch, CanvasStats], Decision],
        vocab_size: int,
    ) -> None:
        super().__init__(UniformNoise(vocab_size))
        self.change = change

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        return self.change(super().decide(pool, batch, stats), pool, batch, stats)
