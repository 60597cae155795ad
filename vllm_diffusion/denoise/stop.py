"""When a canvas is finished."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

MAJORITY: Final = 0.5
"""Above this probability a token is likelier than all others together."""


def stable_and_confident(  # noqa: PLR0917 - tensors of one step, in the order they are compared
    argmax: Tensor,
    history: Tensor,
    entropy: Tensor,
    threshold: Tensor,
    valid: Tensor,
    stability: Tensor | None = None,
) -> Tensor:
    """The argmax has not changed for ``stability`` steps and the mean entropy is low.

    Args:
        argmax: [B, L] int64, argmax of this step.
        history: [B, S, L] int64, argmax of the S previous steps, oldest first, -1 where there was
            none.
        entropy: [B, L] fp32, nats, of the temperature-scaled distribution.
        threshold: [B] fp32, nats; finished below it.
        valid: [B, L] bool, False beyond a canvas's width.
        stability: [B] int64, 0..S, how many of the latest steps count; None for all. With 0 only
            the entropy counts.

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
    """The canvas has little doubt left and overturns no token that was likely one step before.

    Doubt is the expected number of positions at which a sample differs from the argmax: the sum of
    1 - p. It is a sum, so that wide and narrow canvases meet the same criterion.
    A canvas may look certain while parts of it still depend on each other. It then overturns tokens
    that had a probability above ``MAJORITY`` in the last step. Positions that were open may still
    change, so the argmax need not be stable for a step.

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
    overturned = (argmax != last_argmax) & (last_top_prob > MAJORITY) & valid
    doubt = torch.where(valid, 1 - top_prob, 0.0).sum(dim=1)
    return (doubt < threshold) & ~overturned.any(dim=1)


def ended(tokens: Tensor, ends: Tensor, mask_id: int, valid: Tensor) -> Tensor:
    """How many tokens a canvas has up to its first end, if no mask stands before it.

    On absorbing noise these tokens are final, and nobody reads what follows.

    Args:
        tokens: [B, L] int64.
        ends: [B, E] int64, ids that end the answer, -1 pads.
        mask_id: the token of positions that are still open.
        valid: [B, L] bool, False beyond a canvas's width.

    Returns:
        [B] int64, 0 where there is no such end.
    """
    is_end = (tokens[..., None] == ends[:, None]).any(dim=-1) & valid
    masks_before = (tokens == mask_id).cumsum(dim=1)
    final = is_end & (masks_before == 0)
    place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    return torch.where(final.any(dim=1), place[final.int().argmax(dim=1)], 0)
