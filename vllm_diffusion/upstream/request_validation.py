"""A request to a diffusion model is checked by us: one message that names every problem.

vLLM's own check refuses parameters that a canvas can honour (a seed, say) and lets others through
that it then ignores. Ours reads the same request and decides by `vllm_diffusion.params`. It runs in
the process the client talks to, so a refusal is an answer of status 400.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_diffusion.errors import ParamsError
from vllm_diffusion.params import parse_params


def check_requests_ourselves() -> None:
    """Replace `SamplingParams._validate_diffusion` for diffusion models; others keep vLLM's."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._validate_diffusion

    @functools.wraps(original)
    def _validate_diffusion(self: Any, model_config: Any) -> None:
        if not model_config.is_diffusion:
            return
        try:
            parse_params(self, canvas_length=model_config.hf_config.canvas_length)
        except ParamsError as error:
            raise VLLMValidationError(str(error)) from error

    SamplingParams._validate_diffusion = _validate_diffusion


def stock_check_refuses_seed() -> bool:
    """Whether vLLM's own check still refuses what ours accepts."""
    import inspect

    from vllm.sampling_params import SamplingParams

    original = inspect.unwrap(SamplingParams._validate_diffusion)
    return "self.seed is not None" in inspect.getsource(original)
