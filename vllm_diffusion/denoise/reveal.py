"""Which open positions of a canvas get their token in a step."""

from __future__ import annotations

import torch
from torch import Tensor


def scheduled(step: Tensor, max_steps: Tensor, num_open: Tensor, block: int | None) -> Tensor:
    """How many positions a step reveals at least.

    Args:
        step: [B] int64, steps already taken on this canvas.
        max_steps: [B] int64, steps it may take.
        num_open: [B] int64, positions that are open.
        block: positions of a block of the grid, which are spread evenly over the steps, the first
            ones getting one more where they do not divide. None: what is open is spread over the
            steps that are left, rounded up.

    Returns:
        [B] int64, at most ``num_open``; all of it in the last step.

    Source: ``get_num_transfer_tokens`` of SDAR for a grid. Where nothing else reveals, spreading
    what is open is LLaDA's function of the same name.
    """
    if block is None:
        left = (max_steps - step).clamp(min=1)
        share = (num_open + left - 1) // left
    else:
        share = block // max_steps + (step < block % max_steps)
    return torch.where(step + 1 >= max_steps, num_open, torch.minimum(share, num_open))


def revealed(score: Tensor, is_open: Tensor, threshold: Tensor, least: Tensor) -> Tensor:
    """All open positions that score above a threshold; the best ones if these are too few.

    Of equal scores the lowest position comes first. What is not finite comes last, as one score,
    and is above no threshold.

    Args:
        score: [B, L] fp32, see ``score``.
        is_open: [B, L] bool.
        threshold: [B] fp32; 0: the best ones alone.
        least: [B] int64, how many positions to reveal at least, at most as many as are open.

    Returns:
        [B, L] bool, False where not open.
    """
    finite = score.masked_fill(~score.isfinite(), torch.finfo(score.dtype).min)
    limit = torch.where(threshold > 0, threshold, torch.inf)
    above = (finite > limit[:, None]) & is_open
    ranked = finite.masked_fill(~is_open, -torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(score.shape[1], device=score.device)
    best = torch.zeros_like(is_open).scatter_(1, order, place < least[:, None])
    return above | (best & is_open)
