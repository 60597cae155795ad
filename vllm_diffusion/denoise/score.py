"""How sure a position is of its token: what ``reveal`` ranks open positions by.

    drawn      probability of the token under the distribution it was drawn from, tempered and cut
    model      its probability under the model's own: temperature 1, nothing cut or rewritten
    entropy    surest is the least
    margin     probability of the best token minus that of the second
    random     keyed by the request, so that no position is surer than another
    leftmost   by place

A higher score is surer. Only ``drawn``, ``model`` and ``margin`` lie between 0 and 1.

Source: ``drawn`` is SDAR's confidence, ``model`` and ``random`` are LLaDA's, ``entropy`` and
``margin`` Dream's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_diffusion.denoise.constants import REVEAL_BY
from vllm_diffusion.denoise.rng import Purpose, philox, uniform

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from vllm_diffusion.records import CanvasStats


def scores(  # noqa: PLR0917 - what a score may be made of, then the key of a random one
    by: Tensor,
    asked: Collection[str],
    stats: CanvasStats,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
) -> Tensor:
    """The scores of a batch whose canvases may be ranked by different ones.

    Args:
        by: [B] int64, place of each canvas's score in ``REVEAL_BY``.
        asked: all scores that any canvas of the batch is ranked by; no other is computed.
        stats: [B, L]; has the probabilities that the asked scores need.
        seed: [B, 2] int64, see ``rng.philox``.
        position: [B, L] int64, absolute positions.
        step: [B] int64.

    Returns:
        [B, L] fp32.
    """
    found = torch.zeros_like(stats.entropy)
    for name in asked:
        score = _score(name, stats, seed, position, step)
        if len(asked) == 1:
            return score
        found = torch.where((by == REVEAL_BY.index(name))[:, None], score, found)
    return found


def _score(name: str, stats: CanvasStats, seed: Tensor, position: Tensor, step: Tensor) -> Tensor:
    match name:
        case "drawn":
            assert stats.sample_prob is not None
            return stats.sample_prob
        case "model":
            assert stats.own_prob is not None
            return stats.own_prob
        case "entropy":
            return -stats.entropy
        case "margin":
            return stats.margin
        case "random":
            return uniform(philox(seed[:, None], position, step[:, None], Purpose.REVEAL)[0])
    place = torch.arange(position.shape[1], device=position.device, dtype=torch.float32)
    return (-place).expand(position.shape)
