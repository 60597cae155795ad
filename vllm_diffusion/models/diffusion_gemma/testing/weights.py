"""Random weights under which the denoising rule behaves as it does with trained ones.

With Transformers' initial values every logit is near zero, every norm weight and layer scalar is
one, and a test that swaps two of them still passes. Here no two tensors are interchangeable, and a
canvas has confident and doubtful positions, settles over many steps and stops early, late or not at
all.

How. The residual stream is a mix of a token's own embedding and of what the layers add, and the
head is tied to the embedding, so a token's own logit grows with its share of the mix: a token that
was kept confirms itself, a random one is mostly overruled. The constants below were scanned so that
neither wins. Measured with them (fp32, default size, seeds 0 to 2, prompts of 1 to 60 tokens, 24
canvases under the released rule): 19 to 41 steps a canvas, median 25; 9% to 34% of the positions
accepted at the first step, all at the last; quartiles of the entropy 0.000, 0.003 and 0.4 nats, 5%
above 3.8; logits up to 24.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm_diffusion.testing.keyed_noise import keyed_noise

if TYPE_CHECKING:
    import torch

OWN_SHARE = 0.86
"""Share of the token's own embedding in the last hidden state; the layers get the rest."""

SELF_LOGIT = 28.0
"""Logit of the own token before the softcap of 30, well into the bend of tanh; norms lower it."""

TOKEN_SPREAD = 0.4
"""Log-normal spread of embedding norms: some tokens are much surer of themselves than others."""

NORM_SPREAD = 0.25
"""Log-normal spread of norm weights and router scales around their mean."""

SCALAR_SPREAD = 0.15
"""Log-normal spread of layer scalars; drawn apart for encoder and decoder, as a fine-tune could."""

ATTENTION_SPREAD = 1.5
"""Standard deviation of attention scores: peaked, but not on a single position."""

ROUTER_SPREAD = 2.0
"""Standard deviation of router scores: wide enough that two experts hardly ever tie."""


def randomise(model: Any, *, seed: int) -> None:
    """Overwrite every weight of a `DiffusionGemmaForBlockDiffusion`, in place.

    Each tensor has a generator of its own, keyed by `seed` and its name, so adding a layer leaves
    the other layers as they were. Tied weights stay tied.
    """
    import torch

    hidden: int = model.config.text_config.hidden_size
    layers: int = model.config.text_config.num_hidden_layers
    # The decoder's embedding enters the residual stream with root mean square 1, and each of the
    # two sublayers of a layer adds an independent vector of root mean square `added`.
    added = math.sqrt((1 / OWN_SHARE**2 - 1) / (2 * layers))
    last = SELF_LOGIT / (OWN_SHARE * math.sqrt(hidden))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_weight(name, weight.shape, seed=seed, added=added, last=last))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_((SCALAR_SPREAD * _noise(name, buffer.shape, seed)).exp())
            elif name.endswith("std_scale"):
                buffer.copy_((NORM_SPREAD * _noise(name, buffer.shape, seed)).exp())
            elif name.endswith("std_bias"):
                buffer.copy_(NORM_SPREAD * _noise(name, buffer.shape, seed))


def _noise(name: str, shape: Sequence[int], seed: int) -> "torch.Tensor":
    return keyed_noise(f"{seed}:{name}", shape)[0]


def _weight(
    name: str, shape: Sequence[int], *, seed: int, added: float, last: float
) -> "torch.Tensor":
    """Draw the parameter `name`; `randomise` explains the norm scales `added` and `last`."""
    noise = _noise(name, shape, seed)
    root = math.sqrt(shape[-1])  # of the number of inputs
    if name.endswith("embed_tokens.weight"):
        norms = _noise(name + ".norms", (shape[0], 1), seed)
        return noise * (TOKEN_SPREAD * norms).exp() / root
    if name.endswith("router.proj.weight"):
        return ROUTER_SPREAD * noise  # its input is already scaled by 1 / sqrt(hidden)
    if len(shape) > 1:
        return noise / root  # keeps the root mean square of its input
    mean = 1.0
    if name == "model.decoder.norm.weight":
        mean = last
    elif name.endswith((".q_norm.weight", ".k_norm.weight")):
        mean = math.sqrt(ATTENTION_SPREAD / root)
    elif ".vision_tower." not in name and name.endswith(
        ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
    ):
        mean = added
    return mean * (NORM_SPREAD * noise).exp()
