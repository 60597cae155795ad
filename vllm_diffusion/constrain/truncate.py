"""min_p, top_k and top_p on temperature-scaled logits.

All three are thresholds: an id stays if its logit reaches the row's threshold, so ties stay
together and the result depends on no order. A head that sees the vocabulary in tiles can find the
same threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_diffusion.records import Truncation

# An order takes several times the memory of its logits: few rows of a large vocabulary at once.
_SORTED_AT_ONCE: Final = 1 << 23


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
    thresholds = [
        _threshold(scaled[part], truncation, canvas[part])
        for start in range(0, len(scaled), rows)
        for part in (slice(start, start + rows),)
    ]
    return scaled.masked_fill(scaled < torch.cat(thresholds), -torch.inf)


def _threshold(scaled: Tensor, truncation: Truncation, canvas: Tensor) -> Tensor:
    """[R, 1] the least logit that stays."""
    best = scaled.amax(dim=1, keepdim=True)
    threshold = best + truncation.min_p[canvas].log()[:, None]
    if truncation.sorts:
        ordered = scaled.sort(dim=1, descending=True).values
        last = truncation.top_k[canvas].clamp(max=scaled.shape[1]) - 1
        threshold = torch.maximum(threshold, ordered.gather(1, last[:, None]))
        kept = ordered.masked_fill(ordered < threshold, -torch.inf)
        mass = kept.softmax(dim=1)
        # The smallest set that reaches top_p: an id belongs to it while those before it fall short.
        before = mass.cumsum(dim=1) - mass
        top_p = truncation.top_p[canvas][:, None]
        inside = (before < top_p).sum(dim=1, keepdim=True).clamp(min=1) - 1
        nucleus = torch.where(top_p < 1, ordered.gather(1, inside), -torch.inf)
        threshold = torch.maximum(threshold, nucleus)
    return threshold
