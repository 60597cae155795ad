"""The rows that a head is called with, as one record: what comes in, some of it, parts of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vllm_diffusion.records import Noise, Rewrite


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """The arguments of ``Head.__call__``, by the names they have there."""

    hidden: Tensor
    temperature: Tensor
    noise: Noise
    rewrite: Rewrite | None = None
    soft_top_k: Tensor | None = None
    all_near: bool = False

    def __len__(self) -> int:
        """Rows there are."""
        return len(self.hidden)

    def take(self, index: slice | Tensor) -> Rows:
        """Some of the rows."""
        return Rows(
            hidden=self.hidden[index],
            temperature=self.temperature[index],
            noise=self.noise.rows(index),
            rewrite=None if self.rewrite is None else self.rewrite.rows(index),
            soft_top_k=None if self.soft_top_k is None else self.soft_top_k[index],
            all_near=self.all_near,
        )

    def chunks(self, at_once: int) -> Iterator[Rows]:
        """All of them, some at a time: at least one chunk."""
        if len(self) <= at_once:
            yield self
            return
        for start in range(0, len(self), at_once):
            yield self.take(slice(start, start + at_once))
