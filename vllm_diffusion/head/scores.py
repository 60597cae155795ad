"""Scores of chosen tokens from rows that are read a tile at a time, see ``Head.scores``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.transfer import on_device
from vllm_diffusion.head.best import Best
from vllm_diffusion.records import TokenScores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from vllm_diffusion.head.vocabulary import Vocabulary


def scores(
    tiles: Callable[[], Iterator[tuple[int, int, Tensor]]],
    hidden: Tensor,
    tokens: Tensor,
    vocabulary: Vocabulary,
    *,
    count: int,
    ids: tuple[int, ...] | None,
    among: bool,
    raw: bool,
) -> TokenScores:
    """Score tokens: read the rows twice, or read only ``ids`` where these are the whole field.

    Args:
        tiles: begins to read the rows: number, first id and capped logits [R, n] fp32.
        hidden, tokens, count, ids, among: see ``Head.scores``.
        vocabulary: knows the other ranks.
        raw: logits instead of log-probabilities.
    """
    if ids is None:
        asked = tokens[:, None]
        best = Best(min(count, vocabulary.size))
    else:
        beside = on_device(ids, hidden.device).expand(len(hidden), -1)
        asked = torch.cat([tokens[:, None], beside], dim=1)
        best = Best(0)
        if among:
            distinct, place = torch.unique(asked, return_inverse=True)
            values = vocabulary.logits_of(hidden, distinct).gather(1, place)
            return _scored(asked, values, values[:, 1:].logsumexp(1), values[:, 1:], raw=raw)
    # The scored logits come from the same products as the logits they are ranked among.
    values = torch.zeros(asked.shape, device=hidden.device)
    top = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    mass = torch.zeros_like(top)
    for _, first, logits in tiles():
        place = asked - first
        here = (place >= 0) & (place < logits.shape[1])
        values = torch.where(here, logits.gather(1, torch.where(here, place, 0)), values)
        best.add(logits, first)
        higher = torch.maximum(top, logits.amax(dim=1))
        mass = mass * (top - higher).exp() + (logits - higher[:, None]).exp().sum(dim=1)
        top = higher
    values = vocabulary.add(values)
    total = vocabulary.gather(top + mass.log()).logsumexp(dim=0)
    ranks = torch.zeros_like(top)  # counts are exact in fp32 below 2**24
    for _, _, logits in tiles():
        ranks += (logits >= values[:, :1]).sum(dim=1)
    if ids is None:
        more, listed = best.over_ranks(vocabulary)
        values, asked = torch.cat([values, more], dim=1), torch.cat([asked, listed], dim=1)
    if not raw:
        values = values - total[:, None]
    return TokenScores(ids=asked, values=values, ranks=vocabulary.add(ranks).long())


def _scored(ids: Tensor, values: Tensor, total: Tensor, field: Tensor, *, raw: bool) -> TokenScores:
    """Scores among ``field`` alone, the chosen id in the first column of ``values``."""
    ranks = (field >= values[:, :1]).sum(dim=1)
    return TokenScores(ids=ids, values=values if raw else values - total[:, None], ranks=ranks)
