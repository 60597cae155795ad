"""When a canvas is finished."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BELIEVED: Final = 0.5
"""A token that was likelier than all others together, the step before."""


def stable_and_confident(  # noqa: PLR0917 - tensors of one step, in the order they are compared
    argmax: Tensor,
    history: Tensor,
    entropy: Tensor,
    threshold: Tensor,
    valid: Tensor,
    stability: Tensor | None = None,
) -> Tensor:
    """The argmax canvas has not moved for ``stability`` steps and the canvas is certain on average.

    Args:
        argmax: [B, L] int64, argmax of this step.
        history: [B, S, L] int64, argmax of the S previous steps, oldest first, -1 where there was
            none.
        entropy: [B, L] fp32, nats, of the temperature-scaled distribution.
        threshold: [B] fp32, nats; finished below it.
        valid: [B, L] bool, False beyond a canvas's width.
        stability: [B] int64, 0..S, how many of the latest steps count; None for all. 0 asks
            for confidence alone.

    Returns:
        [B] bool.

    Source: ``StableAndConfidentStoppingCriteria`` of Transformers' diffusion_gemma.
    """
    unchanged = (history == argmax[:, None]) | ~valid[:, None]
    if stability is not None:
        age = torch.arange(history.shape[1], 0, -1, device=history.device)
        unchanged |= (age > stability[:, None])[..., None]
    stable = unchanged.flatten(1).all(dim=1)
    mean = torch.where(valid, entropy, 0.0).sum(dim=1) / valid.sum(dim=1)
    return stable & (mean < threshold)


def low_doubt(  # noqa: PLR0917 - two steps, in the order they are compared
    argmax: Tensor,
    top_prob: Tensor,
    last_argmax: Tensor,
    last_top_prob: Tensor,
    threshold: Tensor,
    valid: Tensor,
) -> Tensor:
    """The canvas leaves next to nothing open and takes back nothing that it believed.

    What is left open is the number of tokens that a sample would have otherwise than the argmax, on
    average: the sum of 1 - p. A sum, so that a wide canvas is held to the same as a narrow one.
    A canvas may look certain while it still moves, one part waiting for another. What gives that
    away is that it overturns a token it believed in the step before. It may well settle what was
    open, which is why it need not hold for a step.

    Args:
        argmax: [B, L] int64.
        top_prob: [B, L] fp32, probability of the argmax.
        last_argmax: [B, L] int64, of the step before.
        last_top_prob: [B, L] fp32; 0 where there was no step before.
        threshold: [B] fp32, tokens; finished below it, 0 never finishes.
        valid: [B, L] bool, False beyond a canvas's width.

    Returns:
        [B] bool.
    """
    overturned = (argmax != last_argmax) & (last_top_prob > BELIEVED) & valid
    doubt = torch.where(valid, 1 - top_prob, 0.0).sum(dim=1)
    return (doubt < threshold) & ~overturned.any(dim=1)
