"""When a canvas is finished."""

from __future__ import annotations

import torch
from torch import Tensor


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
