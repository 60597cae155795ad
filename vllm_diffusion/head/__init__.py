"""Hidden rows -> CanvasStats. ``Head`` is the interface, ``reference`` the readable truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.records import CanvasStats, Noise


class Head(Protocol):
    """Turns the final hidden states of R canvas rows into their statistics."""

    def __call__(self, hidden: Tensor, temperature: Tensor, noise: Noise) -> CanvasStats:
        """Statistics of softmax(softcap(hidden @ E^T) / temperature).

        Args:
            hidden: [R, H] model dtype.
            temperature: [R] fp32, positive.
            noise: the key of every row's sample.
        """
        ...
