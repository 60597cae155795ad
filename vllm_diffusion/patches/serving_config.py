"""The entries of vLLM's table of config hooks for our architectures become ours."""

from __future__ import annotations


def install_serving_config() -> None:
    """Point `MODELS_CONFIG_MAP` at `engine.serving` for every architecture of ours."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_diffusion.engine.serving import CanvasServing
    from vllm_diffusion.models import FAMILIES

    MODELS_CONFIG_MAP.update(dict.fromkeys(FAMILIES, CanvasServing))


def hooks_are_in_a_table() -> bool:
    """Whether vLLM still looks hooks up in a table, which has no public way in."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    return isinstance(MODELS_CONFIG_MAP, dict)
