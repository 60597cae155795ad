"""The noise that a family was trained to undo: what a canvas begins with, and returns to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vllm_diffusion.denoise.renoise import initial_canvas, uniform_tokens

if TYPE_CHECKING:
    from torch import Tensor


class CanvasNoise(Protocol):
    """Noise by position, drawn from the request's key."""

    def initial(self, seed: Tensor, position: Tensor) -> Tensor:
        """What new canvases hold.

        Args:
            seed: [B, 2] int64, see ``rng.philox``.
            position: [B, L] int64, absolute positions.

        Returns:
            [B, L] int64.
        """

    def renoise(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """What positions become that were not accepted in a step [B] int64; else as ``initial``."""


@dataclass(frozen=True, slots=True)
class UniformNoise:
    """Uniform random tokens over the whole vocabulary."""

    vocab_size: int

    def initial(self, seed: Tensor, position: Tensor) -> Tensor:
        """See ``renoise.initial_canvas``."""
        return initial_canvas(seed, position, self.vocab_size)

    def renoise(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """See ``renoise.uniform_tokens``."""
        return uniform_tokens(seed, position, step, self.vocab_size)


@dataclass(frozen=True, slots=True)
class AbsorbingNoise:
    """One mask token, which no text may hold."""

    mask_id: int

    def initial(self, seed: Tensor, position: Tensor) -> Tensor:  # noqa: ARG002 - nothing is drawn
        """Masks."""
        return position.new_full(position.shape, self.mask_id)

    def renoise(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:  # noqa: ARG002
        """Masks."""
        return self.initial(seed, position)


def noise_of(mask_id: int | None, vocab_size: int) -> CanvasNoise:
    """The noise of a family: its mask token, or without one any token of the vocabulary."""
    return UniformNoise(vocab_size) if mask_id is None else AbsorbingNoise(mask_id)
