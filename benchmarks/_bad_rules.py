"""Decoding rules known to lose quality, to verify that a quality benchmark detects the loss.

One object serves one engine.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.rules.entropy_bound import EntropyBound

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.noise import CanvasNoise
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision


class Cut(EntropyBound):
    """Stops every canvas after some steps."""

    def __init__(self, noise: CanvasNoise, steps: int) -> None:
        super().__init__(noise)
        self.steps = steps

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """Decide as published, but finish early."""
        decision = super().decide(pool, batch, stats)
        enough = pool.step[batch.slots] + 1 >= self.steps
        return replace(decision, finished=decision.finished | enough)


class Overwrite(EntropyBound):
    """Keeps every sample: what was not accepted does not become noise again."""

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """Decide as published, but renoise nothing."""
        return replace(super().decide(pool, batch, stats), next_tokens=stats.sample)


class Freeze(EntropyBound):
    """Keeps a token for good as soon as its probability reaches 0.6."""

    PROBABILITY = 0.6

    def __init__(self, noise: CanvasNoise) -> None:
        super().__init__(noise)
        self.kept: torch.Tensor | None = None
        """[S, L] int64, -1 where nothing is frozen."""

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """Decide as published, but never take a likely token back."""
        if self.kept is None:
            self.kept = torch.full_like(pool.tokens, -1)
        first = (pool.step[batch.slots] == 0)[:, None]
        kept = self.kept[batch.slots].masked_fill(first, -1)
        kept = torch.where((kept < 0) & (stats.top_prob >= self.PROBABILITY), stats.argmax, kept)
        self.kept[batch.slots] = kept
        # The argmax is what gets committed, so it is frozen in place.
        stats.argmax.copy_(torch.where(kept >= 0, kept, stats.argmax))
        decision = super().decide(pool, batch, stats)
        tokens = torch.where(kept >= 0, kept, decision.next_tokens)
        all_kept = ((kept >= 0) | ~batch.valid).all(dim=1)
        return replace(decision, next_tokens=tokens, finished=decision.finished | all_kept)


BAD_RULES: dict[str, Callable[[CanvasNoise], EntropyBound]] = {
    "cut-2": partial(Cut, steps=2),
    "cut-4": partial(Cut, steps=4),
    "freeze-0.6": Freeze,
    "no-renoise": Overwrite,
}
