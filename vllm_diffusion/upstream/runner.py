"""Which of vLLM's model runners a diffusion model runs on, and why it may not get it."""

from __future__ import annotations

from typing import Any, Final

RUNNER_VARIABLE: Final = "VLLM_USE_V2_MODEL_RUNNER"


def is_diffusion(vllm_config: Any) -> bool:
    """Whether this `VllmConfig` serves a model that vLLM itself calls a diffusion model."""
    model_config = vllm_config.model_config
    return model_config is not None and model_config.is_diffusion


def runner_refusal(variable: str | None, unsupported: list[str]) -> str:
    """Say why a diffusion model cannot start on Model Runner V1, and the way out.

    `variable` is the value of `VLLM_USE_V2_MODEL_RUNNER`, `unsupported` what V2 said it lacks.
    """
    rule = "a diffusion model runs on vLLM's Model Runner V2 only"
    if variable is not None:
        return f"{rule}, and {RUNNER_VARIABLE}={variable} forces V1: unset {RUNNER_VARIABLE}."
    if unsupported:
        return f"{rule}, and V2 does not support: {', '.join(unsupported)}; turn that off."
    return f"{rule}, and vLLM chose V1: install a Triton backend for this host."
