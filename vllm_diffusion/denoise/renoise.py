"""Uniform random tokens for new canvases and rejected positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_diffusion.denoise.rng import Purpose, random_tokens

if TYPE_CHECKING:
    from torch import Tensor


def initial_canvas(seed: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """Uniform random tokens for a new canvas.

    Args:
        seed: [B, 2] int64, see ``rng.philox``.
        position: [B, L] int64, absolute positions of the canvas.
        vocab_size: number of token ids to draw from.

    Returns:
        [B, L] int64.
    """
    step = position.new_zeros(())
    return random_tokens(seed[:, None], position, step, Purpose.INITIAL_CANVAS, vocab_size)


def uniform_tokens(seed: Tensor, position: Tensor, step: Tensor, vocab_size: int) -> Tensor:
    """Uniform random tokens for the rejected positions, drawn over the whole vocabulary.

    The model was trained on full-vocabulary noise, so the draw is never narrowed, not even if a
    request constrains the output.

    Args:
        seed: [B, 2] int64.
        position: [B, L] int64.
        step: [B] int64, the denoising step that rejected them.
        vocab_size: number of token ids to draw from.

    Returns:
        [B, L] int64.
    """
    return random_tokens(seed[:, None], position, step[:, None], Purpose.RENOISE, vocab_size)
