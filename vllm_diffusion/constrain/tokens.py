"""Ids that are allowed, favoured or forbidden, applied to dense logits of a chunk of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def allow_only(logits: Tensor, ids: Tensor) -> Tensor:
    """Every id outside a row's list gets -inf.

    Args:
        logits: [R, V] fp32.
        ids: [R, N] int64, -1 pads; a row of -1 alone allows every id.

    Returns:
        [R, V] fp32, a new tensor.
    """
    listed = ids >= 0
    source = ids.clamp(min=0)
    kept = torch.full_like(logits, -torch.inf)
    # A pad scatters -inf, the least of all values: amax leaves what a listed id has put there.
    value = logits.gather(1, source).masked_fill(~listed, -torch.inf)
    kept.scatter_reduce_(1, source, value, "amax")
    return torch.where(listed.any(dim=1, keepdim=True), kept, logits)


def add_bias(logits: Tensor, ids: Tensor, bias: Tensor) -> Tensor:
    """Add a number to the logits of some ids.

    Args:
        logits: [R, V] fp32.
        ids: [R, N] int64, in the vocabulary.
        bias: [R, N] fp32, finite; 0 pads, which leaves a logit as it is, bit for bit.

    Returns:
        [R, V] fp32, a new tensor.
    """
    return logits.scatter_add(1, ids, bias.to(logits.dtype))


def forbid(logits: Tensor, ids: Tensor) -> Tensor:
    """Give -inf to the ids of a row, unless that would leave the row no id.

    Such a row keeps its logits: a request that contradicts itself (every allowed id forbidden)
    gets its allowed ids rather than a row of NaN.

    Args:
        logits: [R, V] fp32, -inf where not allowed.
        ids: [R, N] int64, -1 pads.

    Returns:
        [R, V] fp32, a new tensor.
    """
    listed = ids >= 0
    penalty = torch.zeros_like(ids, dtype=logits.dtype).masked_fill(listed, -torch.inf)
    masked = logits.scatter_add(1, ids.clamp(min=0), penalty)
    nothing_left = masked.amax(dim=1, keepdim=True) == -torch.inf
    return torch.where(nothing_left, logits, masked)
