"""vLLM's options for a plain decoder that denoises canvases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config.diffusion import DiffusionConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def settle_decoder(vllm_config: VllmConfig) -> None:
    """Set what vLLM sets for its own diffusion models and knows for no other architecture."""
    if vllm_config.diffusion_config is None:
        canvas = vllm_config.model_config.hf_config.canvas_length
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=canvas)
    if vllm_config.attention_config.backend is None:
        # Or a GPU might choose a backend whose rows cannot see those after them.
        vllm_config.attention_config.use_non_causal = True
