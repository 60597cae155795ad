"""vLLM's options for a plain decoder that denoises canvases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.diffusion import DiffusionConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def settle_decoder(vllm_config: VllmConfig, *, canvas: int) -> None:
    """Set what vLLM sets for its own diffusion models and knows for no other architecture.

    Args:
        vllm_config: the engine's config.
        canvas: `canvas_length` where the user gives none.
    """
    if vllm_config.diffusion_config is None:
        vllm_config.diffusion_config = DiffusionConfig()
    if vllm_config.diffusion_config.canvas_length is None:
        vllm_config.diffusion_config.canvas_length = canvas
    if vllm_config.attention_config.backend is None:
        # Or a GPU might choose a backend whose rows cannot see those after them.
        vllm_config.attention_config.use_non_causal = True
