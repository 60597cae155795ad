"""Positions whose token is given.

A pin is held from both sides. Its logits are masked to the one id, so it costs no entropy, keeps
its token in every step, feeds the next step the token's own embedding as self-conditioning and
comes out in the committed argmax. And the first input of the canvas holds it already, so that the
first step reads the token, not noise. Pins are kept by absolute position: they cannot reach a later
canvas, nor one that comes back after preemption.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pin(logits: Tensor, ids: Tensor) -> Tensor:
    """Rows with one id left.

    Args:
        logits: [R, V] fp32.
        ids: [R] int64, the only id of a row, -1 where the row is free.

    Returns:
        [R, V] fp32, a new tensor.
    """
    only = torch.full_like(logits, -torch.inf).scatter_(1, ids.clamp(min=0)[:, None], 0.0)
    return torch.where((ids >= 0)[:, None], only, logits)


def by_position(ids: Tensor, first: Tensor, position: Tensor) -> Tensor:
    """The token that a list keeps for absolute positions.

    Args:
        ids: [B, L] int64, for the positions ``first``, ``first + 1`` ...; -1 where there is none.
        first: [B] int64, absolute position of the list's first entry.
        position: [B, M] int64, absolute.

    Returns:
        [B, M] int64, -1 where there is none.
    """
    offset = position - first[:, None]
    inside = (offset >= 0) & (offset < ids.shape[1])
    found = ids.gather(1, offset.clamp(0, ids.shape[1] - 1))
    return torch.where(inside, found, -1)
