"""The vocabulary as a streaming head reads it: the embedding rows that one rank holds."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import embedding_bag

from vllm_diffusion.head import sample
from vllm_diffusion.head.output_copy import QuantisedOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_diffusion.head.output_copy import HeadForm

logger = logging.getLogger(f"vllm.{__name__}")


def _alone(values: Tensor) -> Tensor:
    return values[None]


def _itself(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Ids ``first`` .. ``first + V_r - 1`` of ``size``, V_r of them on this rank.

    The defaults are those of a rank that holds them all.
    """

    output: Tensor
    """[V_r, H], logits = hidden @ output^T."""
    embedding: Tensor
    """[V_r, H], what the soft embedding averages; the same tensor where the two are tied."""
    size: int
    """Ids over all ranks, below 2**24: ids are exchanged as fp32."""
    softcap: float | None
    """logits become softcap * tanh(logits / softcap), in fp32."""
    scale: Tensor | float = 1.0
    """Factor of a token's embedding."""
    first: int = 0
    gather: Callable[[Tensor], Tensor] = _alone
    """[...] floats of this rank -> [ranks, ...], the same on every rank."""
    add: Callable[[Tensor], Tensor] = _itself
    """[...] floats of this rank -> [...] summed over ranks; may change its argument."""
    loads: Callable[[], int] = lambda: 1
    """How often ``output`` was loaded: weights may be loaded again while the engine runs."""
    copy: QuantisedOutput | None = None
    """Read instead of ``output``, except for the best ids of a row."""

    def copied(self, form: HeadForm | None) -> Vocabulary:
        """The same, its tiles read from a copy of ``output`` in fewer bits; of None, itself."""
        if form is None:
            return self
        copy = QuantisedOutput(self.output, form, loads=self.loads)
        logger.info(
            "The head reads tiles of a copy of its matrix in %s: %.3g MB beside %.3g MB of %s; the "
            "%d best ids of a row are scored exactly.",
            form,
            copy.nbytes / 1e6,
            self.output.nbytes / 1e6,
            self.output.dtype,
            copy.rescored,
        )
        return replace(self, copy=copy)

    def __len__(self) -> int:
        """Ids on this rank."""
        return self.output.shape[0]

    def tiles(self) -> range:
        """First id of every tile of this rank."""
        return range(self.first, self.first + len(self), sample.TILE)

    def block(self) -> int:
        """Columns of a tile as Triton's kernels take it: a power of two, at least 16."""
        widest = min(sample.TILE, len(self))
        return max(16, 1 << (widest - 1).bit_length())

    def capped(self, logits: Tensor) -> Tensor:
        """The softcap, in place."""
        if self.softcap is None:
            return logits
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def logits_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """[R, H] and [N] int64 -> [R, N] fp32 capped logits of these ids alone, on every rank."""
        place, here = self._places(ids)
        logits = (hidden @ self.output[place].T).float().masked_fill_(~here, 0.0)
        return self.capped(self.add(logits))

    def mean_of(self, weight: Tensor, ids: Tensor) -> Tensor:
        """[R, N] fp32 and [N] or [R, N] int64 -> [R, H]: weights @ embeddings of the ids, scaled.

        Ids by row are few: each takes its row of the embedding from memory.
        """
        place, here = self._places(ids)
        weight = weight.to(self.embedding.dtype)
        if ids.dim() == 1:
            rows = self.embedding[place].masked_fill_(~here[:, None], 0.0)
            return self.add(weight @ rows) * self.scale
        weight = weight.masked_fill(~here, 0.0)
        mean = embedding_bag(place, self.embedding, mode="sum", per_sample_weights=weight)
        return self.add(mean) * self.scale

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of this rank for the ids, and which of the ids this rank holds."""
        place = ids - self.first
        here = (place >= 0) & (place < len(self))
        return torch.where(here, place, 0), here
