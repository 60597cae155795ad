"""min_p, top_k and top_p on temperature-scaled logits.

All three are thresholds: an id stays if its logit reaches the row's least one that stays, so ties
stay together and the result depends on no order. A head that sees the vocabulary in tiles finds the
same one, see ``head.cut``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_diffusion.constrain.rewrite import Truncation

# Sorting takes many times the memory of the logits: few rows of a large vocabulary at once.
_SORTED_AT_ONCE: Final = 1 << 20


def truncate(scaled: Tensor, truncation: Truncation, canvas: Tensor) -> Tensor:
    """-inf for the ids that min_p, then top_k, then top_p leave out; at least the best id stays.

    top_p is measured on what the two before it have left, renormalised, as vLLM does.

    Args:
        scaled: [R, V] fp32, logits / temperature.
        truncation: by canvas.
        canvas: [R] int64, the canvas of every row.

    Returns:
        [R, V] fp32, a new tensor.
    """
    rows = max(1, _SORTED_AT_ONCE // scaled.shape[1]) if truncation.sorts else max(1, len(scaled))
    parts = [slice(start, start + rows) for start in range(0, len(scaled), rows)]
    limits = [_limit(scaled[part], truncation.take(canvas[part])) for part in parts]
    return scaled.masked_fill(scaled < torch.cat(limits), -torch.inf)


def nucleus(ordered: Tensor, weight: Tensor, total: Tensor, top_p: Tensor) -> Tensor:
    """[R, 1] the least logit of the smallest set that reaches top_p, -inf where top_p is 1.

    An id belongs to the set while those before it fall short; the best one always does.

    Args:
        ordered: [R, N] logits, best first.
        weight: [R, N] in proportion to their probabilities, 0 for those that are out already.
        total: [R, 1] fp64, the weight of all ids, listed or not.
        top_p: [R] fp32.
    """
    # In fp64: the rounding of a running sum over a large vocabulary would move the border.
    before = weight.cumsum(dim=1, dtype=torch.float64) - weight
    inside = (before < top_p[:, None] * total).sum(dim=1, keepdim=True).clamp(min=1) - 1
    return torch.where(top_p[:, None] < 1, ordered.gather(1, inside), -torch.inf)


def _limit(scaled: Tensor, cut: Truncation) -> Tensor:
    """[R, 1] the least logit that stays, for a truncation by row."""
    best = scaled.amax(dim=1, keepdim=True)
    limit = best + cut.min_p[:, None].log()
    if cut.sorts:
        ordered = scaled.sort(dim=1, descending=True).values
        last = cut.top_k[:, None].clamp(max=scaled.shape[1]) - 1
        limit = torch.maximum(limit, ordered.gather(1, last))
        weight = (ordered - best).exp_().masked_fill_(ordered < limit, 0.0)
        total = weight.sum(dim=1, keepdim=True, dtype=torch.float64)
        limit = torch.maximum(limit, nucleus(ordered, weight, total, cut.top_p))
    return limit
