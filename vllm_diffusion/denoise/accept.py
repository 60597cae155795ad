"""Which positions of a canvas keep the token sampled this step."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

DRIFT: Final = 0.05
"""Largest change of a token's probability in one step that still counts as stable."""


def entropy_bound(entropy: Tensor, bound: Tensor, valid: Tensor) -> Tensor:
    """The lowest-entropy positions whose joint mutual information stays within ``bound`` nats.

    Positions are accepted in ascending entropy while (running sum) - (largest so far) <= bound; in
    ascending order the largest so far is the position's own entropy. The first position always
    passes, so every step accepts at least one.

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


def stable_argmax(  # noqa: PLR0917 - two steps, in the order they are compared
    argmax: Tensor,
    top_prob: Tensor,
    last_argmax: Tensor,
    last_top_prob: Tensor,
    threshold: Tensor,
    valid: Tensor,
) -> Tensor:
    """The positions whose argmax is likely and has not changed since the last step.

    The argmax must be the same token with about the same probability. Two inputs with different
    noise agree on it, so it is accepted whatever its entropy.

    Args:
        argmax: [B, L] int64.
        top_prob: [B, L] fp32, probability of the argmax.
        last_argmax: [B, L] int64, of the step before.
        last_top_prob: [B, L] fp32; 0 where there was no step before.
        threshold: [B] fp32, least probability; 0 selects no position.
        valid: [B, L] bool, False beyond a canvas's width.

    Returns:
        [B, L] bool, False where not valid.

    Source: after KLASS, arXiv 2511.05664, which compares whole distributions.
    """
    stable = (argmax == last_argmax) & ((top_prob - last_top_prob).abs() <= DRIFT)
    stable &= last_top_prob > 0
    likely = (threshold > 0)[:, None] & (top_prob >= threshold[:, None])
    return stable & likely & valid
