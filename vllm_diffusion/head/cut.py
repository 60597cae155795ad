"""Where min_p, top_k and top_p cut, for rows whose logits are seen a tile at a time.

The meaning is ``constrain.truncate``: an id stays if its tempered logit reaches the row's limit.

    the ``LISTED`` best of every row    one pass; if the limit lies above the last of them, no other
                                        id survives, and the vocabulary is not read again
    else the limit alone                two passes a sum: the logits' bits are sorted into a table
                                        by their upper half, then those at the border by their lower

The list serves rows that are certain; a row of an early step may keep thousands of ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.truncate import nucleus
from vllm_diffusion.head.best import Best
from vllm_diffusion.records import TensorRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Truncation
    from vllm_diffusion.head.vocabulary import Vocabulary

LISTED: Final = 512
"""Ids of a row that are kept while it is read."""

_HALF: Final = 16  # bits of an fp32 number that one pass sorts by
_TABLE: Final = 1 << _HALF
_BEST_KEY: Final = (1 << 31) - 1
TABLE_BYTES: Final = 28 * _TABLE
"""Bytes of a row's table, its copy for other ranks, and its part of a tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survivors(TensorRecord):
    """The best ids of R rows, and the limit as far as they determine it."""

    values: Tensor  # [R, N] fp32 logits, best first
    ids: Tensor  # [R, N] int64
    limit: Tensor  # [R] fp32, least tempered logit that stays, where complete
    complete: Tensor  # [R] bool, every surviving id is among these


def survivors(
    tiles: Iterator[tuple[int, int, Tensor]],
    temperature: Tensor,
    cut: Truncation,
    vocabulary: Vocabulary,
) -> Survivors:
    """Read the rows once.

    Args:
        tiles: number, first id and rewritten logits [R, n] fp32 of this rank's tiles; used up.
        temperature: [R] fp32.
        cut: by row.
        vocabulary: knows its size and the other ranks.
    """
    best = Best(min(LISTED, vocabulary.size))
    mass = _Mass(temperature) if cut.sorts else None
    for _, first, logits in tiles:
        best.add(logits, first)
        if mass is not None:
            mass.add(logits)
    values, ids = best.over_ranks(vocabulary)
    ordered = values / temperature[:, None]
    last = ordered[:, -1:]
    whole = (last == -torch.inf) | (values.shape[1] == vocabulary.size)
    limit = ordered[:, :1] + cut.min_p[:, None].log()
    complete = (limit > last) | whole
    if mass is not None:
        known = cut.top_k <= values.shape[1]
        place = cut.top_k.clamp(max=values.shape[1])[:, None] - 1
        kth = ordered.gather(1, place).masked_fill_(~known[:, None], -torch.inf)
        limit = torch.maximum(limit, kth)
        # top_p is measured on what min_p and top_k leave: the list, or the whole row.
        inside = (limit > last) | whole
        uncut = ((cut.min_p == 0) & (cut.top_k >= vocabulary.size))[:, None]
        weight = (ordered - ordered[:, :1]).exp_().masked_fill_(ordered < limit, 0.0)
        listed = weight.sum(dim=1, keepdim=True, dtype=torch.float64)
        total = torch.where(inside, listed, mass.over_ranks(values[:, 0], vocabulary)[:, None])
        limit = torch.maximum(limit, nucleus(ordered, weight, total, cut.top_p))
        complete = (inside | uncut) & ((limit > last) | whole)
    return Survivors(values=values, ids=ids, limit=limit[:, 0], complete=complete[:, 0])


def limits(
    tiles: Callable[[], Iterator[tuple[int, int, Tensor]]],
    best: Tensor,
    temperature: Tensor,
    cut: Truncation,
    vocabulary: Vocabulary,
    *,
    borders: tuple[bool, bool] | None = None,
) -> Tensor:
    """[R] fp32, the least tempered logit that survives, however many do.

    Args:
        tiles: begins to read the rows again; see ``survivors``.
        best: [R] fp32, the largest logit.
        temperature, cut, vocabulary: see ``survivors``.
        borders: whether some ``top_k`` and some ``top_p`` cut; None to look, which may wait.
    """
    of_top_k, of_top_p = borders or (
        bool((cut.top_k < vocabulary.size).any()),
        bool((cut.top_p < 1).any()),
    )
    top = best / temperature
    limit = top + cut.min_p.log()

    def scaled() -> Iterator[Tensor]:
        # + 0.0 makes one zero of two.
        return ((logits / temperature[:, None]).add_(0.0) for _, _, logits in tiles())

    def weight(part: Tensor) -> Tensor:
        return (part - top[:, None]).exp_().masked_fill_(part < limit[:, None], 0.0)

    if of_top_k:
        count = cut.top_k.double()
        kth = _border(scaled, torch.ones_like, lambda _: count, vocabulary)
        limit = torch.maximum(limit, kth)
    if of_top_p:
        edge = _border(scaled, weight, lambda total: cut.top_p * total, vocabulary)
        limit = torch.where(cut.top_p < 1, torch.maximum(limit, edge), limit)
    return limit


def _border(
    scaled: Callable[[], Iterator[Tensor]],
    weigh: Callable[[Tensor], Tensor],
    goal_of: Callable[[Tensor], Tensor],
    vocabulary: Vocabulary,
) -> Tensor:
    """[R] fp32 the largest number whose weight, with all that is above it, reaches the goal.

    Args:
        scaled: begins to read the rows: [R, n] fp32.
        weigh: [R, n] fp32 -> the same shape, what each counts, at least 0.
        goal_of: [R] fp64 weight of a whole row -> [R] fp64; the last that counts is the border
            where rounding puts the goal beyond it.
        vocabulary: knows the other ranks.
    """
    chosen = goal = None
    for low in (False, True):
        table = None
        for part in scaled():
            rank = _rank(part)
            weight = weigh(part).double()
            if chosen is not None:
                weight.masked_fill_((rank >> _HALF) != chosen[:, None], 0.0)
            if table is None:
                table = weight.new_zeros(len(part), _TABLE)
            table.scatter_add_(1, rank & (_TABLE - 1) if low else rank >> _HALF, weight)
        assert table is not None
        # Every communicator takes fp32.
        running = table.copy_(vocabulary.add(table.float())).cumsum_(dim=1)
        reached = running[:, -1]
        goal = torch.minimum(goal_of(reached) if goal is None else goal, reached)
        place = torch.searchsorted(running, goal[:, None]).clamp_(max=_TABLE - 1)
        before = running.gather(1, (place - 1).clamp(min=0)).masked_fill_(place == 0, 0.0)
        goal = goal - before[:, 0]
        chosen = place[:, 0] if chosen is None else chosen << _HALF | place[:, 0]
    assert chosen is not None
    return _number(chosen)


def _rank(numbers: Tensor) -> Tensor:
    """fp32 -> int64 from 0 to 2**32 - 1, the smaller the larger the number is."""
    bits = numbers.view(torch.int32)
    return _BEST_KEY - (bits ^ ((bits >> 31) & _BEST_KEY)).long()


def _number(rank: Tensor) -> Tensor:
    """The inverse of ``_rank``."""
    key = (_BEST_KEY - rank).int()
    return (key ^ ((key >> 31) & _BEST_KEY)).view(torch.float32)


class _Mass:
    """Sum of exp(logit / T) of every row so far, counted against the largest logit so far."""

    def __init__(self, temperature: Tensor) -> None:
        self._temperature = temperature
        self._top = torch.full_like(temperature, torch.finfo(torch.float32).min)
        self._mass = torch.zeros_like(temperature, dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Add [R, n] fp32 logits, which are overwritten."""
        top = torch.maximum(self._top, logits.amax(dim=1))
        shrink = ((self._top - top) / self._temperature).double().exp()
        weight = logits.sub_(top[:, None]).div_(self._temperature[:, None]).exp_()
        self._mass = self._mass * shrink + weight.sum(dim=1)
        self._top = top

    def over_ranks(self, best: Tensor, vocabulary: Vocabulary) -> Tensor:
        """[R] fp64, over all ranks, relative to ``best`` [R] fp32."""
        # Every communicator takes fp32.
        high = self._mass.float()
        sent = vocabulary.gather(torch.stack([self._top, high, (self._mass - high).float()]))
        top, high, low = sent.double().unbind(1)
        return ((high + low) * ((top - best) / self._temperature).exp()).sum(dim=0)
