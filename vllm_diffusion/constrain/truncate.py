"""min_p, top_k and top_p on temperature-scaled logits.

All three are thresholds: an id stays if its logit reaches the row's threshold, so ties stay
together and the result depends on no order. A head that sees the vocabulary in tiles can find the
same threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm_diffusion.records import Truncation


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
    return scaled.masked_fill(scaled < threshold, -torch.inf)
