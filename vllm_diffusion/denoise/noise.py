"""The noise that a family was trained on: new canvases hold it, rejected positions become it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vllm_diffusion.denoise.renoise import initial_canvas, uniform_tokens

if TYPE_CHECKING:
    from torch import Tensor


class CanvasNoise(Protocol):
    """Noise by position, drawn from the request's key."""

    def initial(self, seed: Tensor, position: Tensor) -> Tensor:
        """The tokens of new canvases.

        Args:
            seed: [B, 2] int64, see ``rng.philox``.
            position: [B, L] int64, absolute positions.

        Returns:
            [B, L] int64.
        """

    def renoise(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
        """The tokens of positions rejected in a step [B] int64; arguments as for ``initial``."""


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
    """One mask token, which must not occur in text."""

    mask_id: int

    def initial(self, seed: Tensor, position: Tensor) -> Tensor:  # noqa: ARG002 - nothing is drawn
        """Masks."""
        return position.new_full(position.shape, self.mask_id)

    def renoise(self, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:  # noqa: ARG002
        """Masks."""
        return self.initial(seed, position)


def noise_of(mask_id: int | None, vocab_size: int) -> CanvasNoise:
    """The noise of a family: its mask token, or uniform over the vocabulary if it has none."""
    return UniformNoise(vocab_size) if mask_id is None else AbsorbingNoise(mask_id)
