"""What a head is called with: R canvas rows as one record, which can be split by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Rewrite
    from vllm_diffusion.records import Noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """R canvas rows and everything that decides their statistics."""

    hidden: Tensor
    """[R, H] model dtype, final hidden states."""
    temperature: Tensor
    """[R] fp32, positive; includes the factor in ``rewrite.temperature``."""
    noise: Noise
    """The key of every row's sample."""
    rewrite: Rewrite | None = None
    """What requests change in the logits, see ``constrain.logits``. All statistics describe the
    changed distribution. None: nothing."""
    soft_top_k: Tensor | None = None
    """[R] int64, how many of the most likely ids the soft embedding averages, with renormalised
    probabilities: an approximation. 0, or None for all rows, averages all ids, exactly. -1: nobody
    reads the soft embedding of this row, and it is 0."""
    all_near: bool = False
    """The host knows that ``soft_top_k`` has no 0. A GPU, where nobody looks at these numbers, then
    skips the second product."""
    self_conditioning: bool = True
    """The model is conditioned on soft embeddings. If not, none is computed: the statistics have
    None in their place, and the second product is skipped on every device."""
    sample_prob: bool = False
    own_prob: bool = False
    """Some rule reads this statistic, see ``CanvasStats``."""

    def __len__(self) -> int:
        """R."""
        return len(self.hidden)

    def take(self, index: slice | Tensor) -> Rows:
        """The rows at ``index``."""
        return Rows(
            hidden=self.hidden[index],
            temperature=self.temperature[index],
            noise=self.noise.take(index),
            rewrite=None if self.rewrite is None else self.rewrite.take(index),
            soft_top_k=None if self.soft_top_k is None else self.soft_top_k[index],
            all_near=self.all_near,
            self_conditioning=self.self_conditioning,
            sample_prob=self.sample_prob,
            own_prob=self.own_prob,
        )

    def unread(self) -> CanvasStats:
        """Zeros in place of the statistics of all rows, where nobody reads them."""
        return CanvasStats.zeros(
            self.hidden,
            self_conditioning=self.self_conditioning,
            sample_prob=self.sample_prob,
            own_prob=self.own_prob,
        )

    def chunks(self, at_once: int) -> Iterator[Rows]:
        """All rows, ``at_once`` at a time: at least one chunk."""
        if len(self) <= at_once:
            yield self
            return
        for start in range(0, len(self), at_once):
            yield self.take(slice(start, start + at_once))
