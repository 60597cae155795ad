"""vLLM's own checks of a diffusion model's request become ours: ``engine.admission``.

vLLM refuses parameters that a canvas can honour (a seed, say), lets others through that it then
ignores, and refuses every constraint. The checks run in the process that the client talks to, so a
refusal is an answer of status 400.

These wrappers are installed in every process; what they call is loaded by the first request.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def check_parameters(stock: Callable[..., None]) -> Callable[..., None]:
    """Make `SamplingParams._validate_diffusion` check what a canvas cannot honour."""

    def checked(self: Any, model_config: Any) -> None:
        if not model_config.is_diffusion:
            return stock(self, model_config)
        from vllm_diffusion.engine import admission

        return admission.check_parameters(self, model_config)

    return checked


def check_constraint(stock: Callable[..., None]) -> Callable[..., None]:
    """Make `SamplingParams._validate_structured_outputs` check constraints as ours are kept."""

    def checked(
        self: Any, model_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        if not model_config.is_diffusion:
            return stock(self, model_config, structured_outputs_config, tokenizer)
        from vllm_diffusion.engine import admission

        return admission.check_constraint(self, model_config, structured_outputs_config, tokenizer)

    return checked


def seed_is_refused() -> bool:
    """Whether vLLM's own check still refuses what ours accepts."""
    from vllm.sampling_params import SamplingParams

    original = inspect.unwrap(SamplingParams._validate_diffusion)
    return "self.seed is not None" in inspect.getsource(original)


def constraints_are_refused() -> bool:
    """Whether vLLM's own check still refuses every constraint of a diffusion model."""
    from vllm.sampling_params import SamplingParams

    original = inspect.unwrap(SamplingParams._validate_structured_outputs)
    return "if model_config.is_diffusion:" in inspect.getsource(original)
