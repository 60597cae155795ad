"""The soft embedding [R, H] of rows that are read a tile at a time: a mean of embeddings.

of all ids       the product of a tile's weights and its part of the embedding, tile by tile
of the k best    an approximation that requests may ask for: no product, k rows of the embedding
of none          nobody will read it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.head.best import Best

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.tile import RunningStats
    from vllm_diffusion.head.vocabulary import Vocabulary


MOST: Final = 64
"""Ids that a request may ask for at most, see ``params``."""


class SoftEmbedding:
    """Sees every tile before and after ``tile.absorb``.

    Asking a GPU what its rows want would wait for it, so there every row is computed both ways.

    Args:
        vocabulary: of this rank.
        top_k: [R] int64, see ``Head``; None where all rows take all ids.
        like: [R] fp32, somewhere on the device.
    """

    def __init__(self, vocabulary: Vocabulary, top_k: Tensor | None, like: Tensor) -> None:
        self._vocabulary, self._top_k = vocabulary, top_k
        self._exact: slice | Tensor = slice(None)
        self._near: slice | Tensor | None = None
        self._rows = rows = len(like)
        if top_k is not None and like.device.type != "cpu":
            self._near = slice(None)
            self._best = Best(min(MOST + 1, vocabulary.size))
        elif top_k is not None:
            self._exact = (top_k == 0).nonzero()[:, 0]
            rows = len(self._exact)
            near = (top_k > 0).nonzero()[:, 0]
            if len(near):
                self._near = near
                self._best = Best(min(int(top_k[near].max()) + 1, vocabulary.size))
        self._soft = like.new_zeros(rows, vocabulary.embedding.shape[1])

    def see(self, logits: Tensor, first: int) -> None:
        """Add the logits [R, n] of the ids from ``first`` on, before they are overwritten."""
        if self._near is not None:
            every = isinstance(self._near, slice) or len(self._near) == self._rows
            self._best.add(logits if every else logits[self._near], first)

    def add(self, weight: Tensor, shrink: Tensor, first: int) -> None:
        """Add the weights that ``tile.absorb`` made of them."""
        if not len(self._soft):
            return
        start = first - self._vocabulary.first
        embedding = self._vocabulary.embedding[start : start + weight.shape[1]]
        if len(self._soft) < self._rows:
            weight, shrink = weight[self._exact], shrink[self._exact]
        self._soft.mul_(shrink[:, None])
        if embedding.dtype == torch.float32:
            self._soft.addmm_(weight, embedding)
        else:
            self._soft.add_(weight.to(embedding.dtype) @ embedding)

    def over_ranks(
        self, together: RunningStats, shrink: Tensor, temperature: Tensor, *, capped: bool
    ) -> Tensor:
        """[R, H] model dtype, scaled like an embedding, of all ranks.

        Args:
            together, shrink: from ``RunningStats.over_ranks``.
            temperature: [R] fp32.
            capped: the logits seen were softcapped.
        """
        vocabulary, dtype = self._vocabulary, self._vocabulary.embedding.dtype
        exact = self._exact
        soft = self._soft.mul_((shrink / together.mass)[exact, None])
        # Scaled first: one rounding, and the only large one, see benchmarks/head.py.
        soft = (vocabulary.add(soft) * vocabulary.scale).to(dtype)
        if self._top_k is None:
            return soft
        every = soft.new_zeros(self._rows, soft.shape[1])
        every[exact] = soft
        if (near := self._near) is not None:
            values, ids = self._best.over_ranks(vocabulary)
            if not capped:
                values = vocabulary.capped(values)
            mean = mean_of_best(
                vocabulary,
                values,
                ids,
                self._top_k[near],
                argmax=together.argmax[near],
                temperature=temperature[near],
            )
            if isinstance(near, slice):
                return select(self._top_k, soft, mean)
            every[near] = mean
        return every


def select(top_k: Tensor, exact: Tensor, near: Tensor) -> Tensor:
    """[R, H], by row: ``exact`` where ``top_k`` [R] is 0, ``near`` above 0, zeros below 0."""
    count = top_k[:, None]
    return torch.where(count > 0, near, torch.where(count == 0, exact, 0.0))


def mean_of_best(
    vocabulary: Vocabulary,
    values: Tensor,
    ids: Tensor,
    count: Tensor,
    *,
    argmax: Tensor,
    temperature: Tensor,
) -> Tensor:
    """[R, H] model dtype, the mean of the embeddings of the ``count`` best ids, scaled.

    Args:
        vocabulary: of this rank.
        values: [R, N] fp32 capped logits, best first; N above every count, or all ids.
        ids: [R, N] int64 of all ranks.
        count: [R] int64, 0 for all of the N.
        argmax: [R] int64.
        temperature: [R] fp32.
    """
    taken = _above(values, values.gather(1, count.clamp(0, values.shape[1] - 1)[:, None]), count)
    # Where more ids than that are equally good, take the argmax alone.
    ids = torch.where(taken.any(dim=1, keepdim=True), ids, argmax[:, None])
    taken |= ~taken.any(dim=1, keepdim=True)
    weight = (values - values[:, :1]).div_(temperature[:, None]).exp_() * taken
    return vocabulary.mean_of(weight / weight.sum(dim=1, keepdim=True), ids)


def most_likely(values: Tensor, count: Tensor) -> Tensor:
    """[R, N] bool, the ids that a soft embedding of ``count`` ids averages.

    Equal values at the border are taken together or not at all, so the result depends on no order.
    A row that is left without any has nothing marked.

    Args:
        values: [R, N], larger is likelier.
        count: [R] int64, 0 for all.
    """
    most = MOST
    if count.device.type == "cpu" and (most := int(count.max())) <= 0:
        return torch.ones_like(values, dtype=torch.bool)
    best = values.topk(min(most + 1, values.shape[1]), dim=1).values
    return _above(values, best.gather(1, count.clamp(0, best.shape[1] - 1)[:, None]), count)


def _above(values: Tensor, next_best: Tensor, count: Tensor) -> Tensor:
    return (values > next_best) | ((count <= 0) | (count >= values.shape[1]))[:, None]
