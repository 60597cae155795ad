"""DiffusionParams: what one request may set, and one error message that names every problem.

Takes the sampling parameters of vLLM's request (any object with their attributes) and gives a
frozen record. Never changes the request, never imports vLLM.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX: Final = "diffusion_"
"""Every option of ours in ``extra_args`` / ``vllm_xargs`` starts with this."""

MAX_STEPS: Final = 1024
"""Most denoising steps a request may ask for; published rules take 48, and nobody may hold a slot
for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionParams:
    """The diffusion options of a request; None leaves the served value."""

    max_steps: int | None = None
    """Denoising steps a canvas may take; the temperature ramp follows it."""
    canvas_length: int | None = None
    """Canvas width, at most the served one."""


# The sampling parameters that have no meaning on a canvas yet, and when they are set.
_UNSUPPORTED: Final[dict[str, Callable[[Any], bool]]] = {
    "temperature": lambda value: value != 1.0,
    "top_p": lambda value: value != 1.0,
    "top_k": lambda value: value > 0,
    "min_p": lambda value: value > 0,
    "min_tokens": lambda value: value > 0,
    "presence_penalty": lambda value: value != 0,
    "frequency_penalty": lambda value: value != 0,
    "repetition_penalty": lambda value: value != 1,
    "logit_bias": bool,
    "bad_words": bool,
    "allowed_token_ids": bool,
    "logprobs": lambda value: value is not None,
    "logprob_token_ids": bool,
    "prompt_logprobs": lambda value: value is not None,
    "prompt_logprob_token_ids": lambda value: value is not None,
    "structured_outputs": lambda value: value is not None,
    "thinking_token_budget": lambda value: value is not None,
    "trace_decode_token_ids": bool,
}

# Where the client did not write what the sampling parameters hold.
_SHOWN_AS: Final = {
    "structured_outputs": "structured_outputs (response_format, or a tool call that is required)"
}

_OPTIONS: Final = {
    "diffusion_max_steps": "max_steps",
    "diffusion_canvas_length": "canvas_length",
}


def parse_params(
    sampling: Any,  # noqa: ANN401 - vLLM's SamplingParams by its attributes
    *,
    canvas_length: int | None = None,
) -> DiffusionParams:
    """The diffusion options of a request, or one error listing everything that is wrong with it.

    Args:
        sampling: vLLM's ``SamplingParams``.
        canvas_length: the served canvas, None where it is not known yet.

    Raises:
        ParamsError: unsupported sampling parameters, unknown or malformed diffusion options.
    """
    unsupported = [
        _SHOWN_AS.get(name, f"{name}={reprlib.repr(value)}")
        for name, is_set in _UNSUPPORTED.items()
        if (value := getattr(sampling, name)) is not None and is_set(value)
    ]
    problems = []
    if unsupported:
        problems.append(
            f"not supported by this diffusion model yet: {', '.join(unsupported)} "
            "(leave them at their defaults; the checkpoint's schedule sets the temperature)"
        )
    fields, wrong = _options(sampling.extra_args or {}, canvas_length)
    problems += wrong
    if problems:
        raise ParamsError("; ".join(problems))
    return DiffusionParams(**fields)


def admitted_params(extra_args: Mapping[str, Any] | None) -> DiffusionParams:
    """The options of a request that ``parse_params`` has let through; never raises.

    For the worker, where an exception would end the engine, and where vLLM's own warm-up requests
    arrive with whatever they like.
    """
    extra = extra_args or {}
    return DiffusionParams(
        **{field: extra[name] for name, field in _OPTIONS.items() if name in extra}
    )


def _options(
    extra: Mapping[str, Any], canvas_length: int | None
) -> tuple[dict[str, int], list[str]]:
    """The options among ``extra`` as fields of DiffusionParams, and what is wrong with them."""
    fields: dict[str, int] = {}
    problems = []
    for name, value in extra.items():
        if not name.startswith(PREFIX):
            continue
        if name not in _OPTIONS:
            problems.append(f"unknown option {name!r}; accepted: {', '.join(_OPTIONS)}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problems.append(f"{name} must be a positive integer, got {reprlib.repr(value)}")
        elif name == "diffusion_max_steps" and value > MAX_STEPS:
            problems.append(f"{name} must be at most {MAX_STEPS}, got {reprlib.repr(value)}")
        elif name == "diffusion_canvas_length" and canvas_length and value > canvas_length:
            problems.append(
                f"diffusion_canvas_length must not exceed the served canvas of "
                f"{canvas_length}, got {value}"
            )
        else:
            fields[_OPTIONS[name]] = value
    return fields, problems
