"""The architecture's entry in vLLM's table of config hooks becomes ours, which extends vLLM's."""

from __future__ import annotations

from typing import Final

ARCHITECTURE: Final = "DiffusionGemmaForBlockDiffusion"


def install_serving_config() -> None:
    """Point `MODELS_CONFIG_MAP` at `engine.serving`."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_diffusion.engine.serving import DiffusionGemmaServing

    MODELS_CONFIG_MAP[ARCHITECTURE] = DiffusionGemmaServing


def architecture_is_in_table() -> bool:
    """Whether the table still exists and knows the architecture; there is no public way in."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    return ARCHITECTURE in MODELS_CONFIG_MAP
