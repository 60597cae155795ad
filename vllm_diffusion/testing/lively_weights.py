"""Random weights for a decoder of Transformers under which a canvas is worth denoising.

Takes a model and a seed. No two tensors are interchangeable, attention is peaked, and the last
hidden state depends on tokens and places enough that the positions of a canvas are answered
differently and with different confidence. Measured on the checkpoints of `models.sdar.testing` and
`models.llada.testing` (fp32, default sizes, blocks of 8, seed 0, 32 or 40 greedy tokens after
prompts of 1, 4, 8, 11 and 37, one token a step): the quartiles of a token's probability in the step
that revealed it are 0.59 to 0.69, 0.76 to 0.85 and 0.93 to 0.95; 11% to 21% of the tokens are the
one before them.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm_diffusion.testing.keyed_noise import keyed_noise

if TYPE_CHECKING:
    import torch

GAIN = 1.6
"""Growth of a vector in a matrix of a layer."""

HEAD_GAIN = 5.0
"""Standard deviation of the logits, nearly."""

NORM_SPREAD = 0.3
"""Log-normal spread of norm weights around their mean."""

ATTENTION_SPREAD = 9.0
"""Standard deviation of attention scores: a row looks at few others."""


def randomise(model: Any, *, seed: int, never: Iterable[int]) -> None:  # noqa: ANN401
    """Overwrite every weight, in place.

    Each tensor has a generator of its own, keyed by `seed` and its name, so adding a layer leaves
    the other layers as they were.

    Args:
        model: a decoder of Transformers with a head; tied weights stay tied.
        seed: another one changes every weight.
        never: ids whose logits are 0: among hundreds of others that is never the largest.
    """
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_weight(name, weight.shape, seed))
        if model.config.tie_word_embeddings:
            model.model.norm.weight.mul_(HEAD_GAIN / math.sqrt(model.config.hidden_size))
        model.lm_head.weight[list(never)] = 0.0


def _weight(name: str, shape: "torch.Size", seed: int) -> "torch.Tensor":
    noise = keyed_noise(f"{seed}:{name}", shape)[0]
    spread = math.sqrt(ATTENTION_SPREAD)
    if name.endswith("embed_tokens.weight"):
        return noise
    if len(shape) > 1:
        gain = GAIN
        if name.startswith("lm_head."):
            gain = HEAD_GAIN
        elif name.endswith((".q_proj.weight", ".k_proj.weight")):
            gain = spread
        return gain * noise / math.sqrt(shape[-1])  # of the number of inputs
    mean = spread if name.endswith((".q_norm.weight", ".k_norm.weight")) else 1.0
    return mean * (NORM_SPREAD * noise).exp()
