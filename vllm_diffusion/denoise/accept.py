"""Which positions of a canvas keep the token sampled this step."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_bound(entropy: Tensor, bound: Tensor, valid: Tensor) -> Tensor:
    """The lowest-entropy positions whose joint mutual information stays within ``bound`` nats.

    Positions are taken in ascending entropy while (running sum) - (largest so far) <= bound; in
    ascending order the largest so far is the position itself. The first position always passes, so
    every step accepts at least one.

    Args:
        entropy: [B, L] fp32, nats.
        bound: [B] fp32, nats.
        valid: [B, L] bool, False beyond a canvas's width.

    Returns:
        [B, L] bool, False where not valid.

    Source: EB-sampler, arXiv 2505.24857; ``EntropyBoundSampler.accept_canvas`` of Transformers.
    """
    # Padding sorts last and adds nothing to the running sum of the positions before it.
    ordered, index = entropy.masked_fill(~valid, torch.inf).sort(dim=-1, stable=True)
    spent = ordered.cumsum(dim=-1) - ordered
    within = spent <= bound[:, None]
    return torch.zeros_like(valid).scatter_(1, index, within) & valid
