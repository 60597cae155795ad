"""Which positions of a canvas keep the token sampled this step."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

DRIFT: Final = 0.05
"""Most that the probability of a token may have moved in a step for its belief to be at rest."""


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


def held(  # noqa: PLR0917 - two steps, in the order they are compared
    argmax: Tensor,
    top_prob: Tensor,
    last_argmax: Tensor,
    last_top_prob: Tensor,
    threshold: Tensor,
    valid: Tensor,
) -> Tensor:
    """The positions whose argmax is likely, was the argmax the step before, and as likely.

    What two inputs, noised differently, agree upon needs no entropy to vouch for it.

    Args:
        argmax: [B, L] int64.
        top_prob: [B, L] fp32, probability of the argmax.
        last_argmax: [B, L] int64, of the step before.
        last_top_prob: [B, L] fp32; 0 where there was no step before.
        threshold: [B] fp32, least probability; 0 holds nothing.
        valid: [B, L] bool, False beyond a canvas's width.

    Returns:
        [B, L] bool, False where not valid.

    Source: after KLASS, arXiv 2511.05664, which compares whole distributions.
    """
    at_rest = (argmax == last_argmax) & ((top_prob - last_top_prob).abs() <= DRIFT)
    at_rest &= last_top_prob > 0
    likely = (threshold > 0)[:, None] & (top_prob >= threshold[:, None])
    return at_rest & likely & valid
