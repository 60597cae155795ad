"""A ``Rewrite`` on dense logits, in the order that defines it.

    softcapped logits
      -> only allowed ids        others -inf
      -> + logit_bias
      -> penalties               of the text before the canvas
      -> - forbidden ids         min_tokens, bad words: -inf, unless nothing would be left
      -> pins                    one id, all others -inf: a pin wins over every other wish
      -> / temperature
      -> min_p, top_k, top_p

Masks commute with bias and penalties, so forbidding comes last among them, where it can be seen
whether anything is left. Rows whose canvas asks for nothing keep their logits bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.penalties import penalise
from vllm_diffusion.constrain.pins import pin
from vllm_diffusion.constrain.tokens import add_bias, allow_only, forbid
from vllm_diffusion.constrain.truncate import truncate

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Rewrite


LENIENCE: Final = 4096.0
"""Nats that a forbidden id costs where a constraint may still have to choose it: more than any text
of the constraint that does without it, less than would lose the logits under it in fp32."""


def rewrite_logits(logits: Tensor, rewrite: Rewrite) -> Tensor:
    """Everything before the temperature.

    Args:
        logits: [R, V] fp32.
        rewrite: of these R rows.
    """
    canvas = rewrite.canvas
    if rewrite.allowed is not None:
        logits = allow_only(logits, rewrite.allowed[canvas])
    if rewrite.bias is not None:
        ids, bias = rewrite.bias
        logits = add_bias(logits, ids[canvas], bias[canvas])
    if (cost := rewrite.penalties) is not None:
        logits = penalise(logits, cost.ids[canvas], cost.scale[canvas], cost.offset[canvas])
    if rewrite.forbidden is not None:
        logits = forbid(logits, rewrite.forbidden)
    if rewrite.pinned is not None:
        logits = pin(logits, rewrite.pinned)
    return logits


def truncate_logits(scaled: Tensor, rewrite: Rewrite) -> Tensor:
    """Everything behind the temperature.

    Args:
        scaled: [R, V] fp32, rewritten logits / temperature.
        rewrite: of these R rows.
    """
    if rewrite.truncation is None:
        return scaled
    return truncate(scaled, rewrite.truncation, rewrite.canvas)


def lenient_logits(logits: Tensor, rewrite: Rewrite, temperature: Tensor) -> Tensor:
    """The rewrite for rows under a constraint, which wins over every other wish.

    What is not allowed, forbidden or cut off costs ``LENIENCE`` nats, once, instead of everything:
    the constraint never finds nothing left. Pins stay, they were checked against it.

    Args:
        logits: [R, V] fp32, softcapped.
        rewrite: of these R rows.
        temperature: [R] fp32.

    Returns:
        [R, V] fp32, tempered.
    """
    temperature = temperature[:, None]
    strict = rewrite_logits(logits, replace(rewrite, pinned=None)) / temperature
    strict = truncate_logits(strict, rewrite)
    dear = rewrite_logits(logits, rewrite.without_masks()) - LENIENCE * temperature
    scaled = torch.where(strict == -torch.inf, dear / temperature, strict)
    return scaled if rewrite.pinned is None else pin(scaled, rewrite.pinned)
