"""Hidden rows -> CanvasStats. ``Head`` is the interface, ``reference`` the readable truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.records import CanvasStats, Noise, Rewrite


class Head(Protocol):
    """Turns the final hidden states of R canvas rows into their statistics."""

    def __call__(
        self, hidden: Tensor, temperature: Tensor, noise: Noise, rewrite: Rewrite | None = None
    ) -> CanvasStats:
        """Statistics of softmax(rewritten(softcap(hidden @ E^T)) / temperature).

        Args:
            hidden: [R, H] model dtype.
            temperature: [R] fp32, positive.
            noise: the key of every row's sample.
            rewrite: what requests change, see ``constrain.rewrite``; every statistic is of the
                changed distribution. Its temperature is already in ``temperature``.
        """
        ...

    def candidates(self, hidden: Tensor, rewrite: Rewrite, count: int) -> Tensor:
        """The best ids of every row after the rewrite, truncation left out.

        Args:
            hidden: [R, H] model dtype.
            rewrite: of these rows.
            count: ids a row.

        Returns:
            [R, min(count, vocab)] int64, best first, -1 where fewer ids may stand there.
        """
        ...
