"""A request parsed: its options, or one error that names everything that is wrong with it.

Never changes the request. What each parameter means on a canvas stands in docs/parameters.md.
"""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.denoise.constants import LARGEST, SMALLEST, ServedRules
from vllm_diffusion.errors import ParamsError
from vllm_diffusion.family import Text
from vllm_diffusion.request.options import (
    PREFIX,
    DiffusionParams,
    foreign_constants,
    read_options,
    requested_rule,
)
from vllm_diffusion.request.text import CanvasText, text_contradictions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# The sampling parameters that have no meaning on a canvas yet, and when they are set.
UNSUPPORTED: Final[dict[str, Callable[[Any], bool]]] = {
    "thinking_token_budget": lambda value: value is not None,
    "trace_decode_token_ids": bool,
}


def parse_params(
    sampling: Any,  # noqa: ANN401 - vLLM's SamplingParams by its attributes
    *,
    canvas_length: int | None = None,
    vocab_size: int | None = None,
    rules: ServedRules | None = None,
    text: Text = Text.CAUSAL,
    banned: Collection[int] = (),
) -> DiffusionParams:
    """The diffusion options of a request, or one error listing everything that is wrong with it.

    Args:
        sampling: vLLM's ``SamplingParams``.
        canvas_length: the served canvas, None where it is not known yet.
        vocab_size: number of token ids, None where it is not known.
        rules: the served rules, None where they are not known.
        text: what the model's text sees.
        banned: ids that no text of the model may hold.

    Raises:
        ParamsError: unsupported sampling parameters, wishes that exclude each other, unknown or
            malformed diffusion options.
    """
    unsupported = [
        f"{name}={reprlib.repr(value)}"
        for name, is_set in UNSUPPORTED.items()
        if (value := getattr(sampling, name)) is not None and is_set(value)
    ]
    problems = []
    if unsupported:
        problems.append(
            f"not supported by this diffusion model yet: {', '.join(unsupported)} "
            "(leave them at their defaults)"
        )
    params, wrong = read_options(sampling.extra_args or {}, rules)
    problems += wrong
    problems += _against_served(params, canvas_length, vocab_size, rules, text)
    problems += _contradictions(sampling, params)
    problems += _about_ids(sampling, params, set(banned))
    problems += _against_text(sampling, params, text)
    if problems:
        raise ParamsError("; ".join(problems))
    return params


def _against_served(
    params: DiffusionParams,
    canvas_length: int | None,
    vocab_size: int | None,
    rules: ServedRules | None,
    text: Text,
) -> list[str]:
    """What the engine, as it is served, cannot give."""
    problems = []
    width = params.canvas_length or canvas_length
    if canvas_length and params.canvas_length and params.canvas_length > canvas_length:
        problems.append(
            f"diffusion_canvas_length must not exceed the served canvas of {canvas_length}, "
            f"got {params.canvas_length}"
        )
    # On a grid the first canvas ends where its block does, which only the prompt tells.
    given, exactly = len(params.seed_canvas), text is not Text.BLOCK
    if given and width and (given != width if exactly else given > width):
        problems.append(
            f"diffusion_seed_canvas must hold {'exactly' if exactly else 'at most'} {width} ids, "
            f"got {given}"
        )
    if vocab_size and max(params.seed_canvas, default=0) >= vocab_size:
        problems.append(
            f"diffusion_seed_canvas ids must be below {vocab_size}, got {max(params.seed_canvas)}"
        )
    if params.pinned and not params.seed_canvas:
        problems.append("diffusion_pinned needs a diffusion_seed_canvas that says what to hold")
    elif params.pinned and max(params.pinned) >= len(params.seed_canvas):
        problems.append(
            f"diffusion_pinned positions must lie inside the canvas of {len(params.seed_canvas)}, "
            f"got {max(params.pinned)}"
        )
    if rules is None:
        return problems
    if foreign := foreign_constants(params, rules):
        return problems + foreign
    rule = requested_rule(params, rules)
    if rule.remembered > rules.remembered:
        problems.append(
            f"diffusion_stability_threshold must be at most the served {rules.remembered}, "
            f"got {rule.remembered}"
        )
    return problems + rule.incoherent(beside=rules.default, prefix=PREFIX)


def _against_text(
    sampling: Any,  # noqa: ANN401
    params: DiffusionParams,
    text: Text,
) -> list[str]:
    """What text that is not causal leaves without a meaning."""
    problems = []
    if text is not Text.CAUSAL and sampling.prompt_logprobs is not None:
        problems.append(
            "prompt_logprobs is not supported by this model: a row of its prompt has seen the "
            "token it would predict"
        )
    if text is not Text.WHOLE and params.approximate_prefix:
        problems.append(
            "diffusion_approximate_prefix is not supported by this model, whose text is computed "
            "once and exactly"
        )
    if text is Text.BLOCK and params.canvas_length is not None:
        problems.append(
            "diffusion_canvas_length is not supported by this model, whose canvases are the "
            "blocks it was trained on"
        )
    return problems


def _contradictions(
    sampling: Any,  # noqa: ANN401
    params: DiffusionParams,
) -> list[str]:
    """Wishes of one request that cannot all come true."""
    text = params.text or CanvasText()
    problems = text_contradictions(
        sampling,
        text,
        seed_canvas=params.seed_canvas,
        noise_level=params.noise_level,
        read_only=params.read_only,
    )
    if sampling.structured_outputs is not None and (text.template or text.suffix):
        problems.append(
            "diffusion_template and suffix say what the answer is, and so does a constraint "
            "(structured_outputs, response_format or a tool call that is required): keep one"
        )
    bias = sampling.logit_bias or {}
    if wild := {token: value for token, value in bias.items() if not abs(value) <= LARGEST}:
        problems.append(f"logit_bias must be finite, up to {LARGEST:g}, got {reprlib.repr(wild)}")
    if not SMALLEST <= (scale := sampling.repetition_penalty) <= LARGEST:
        problems.append(f"repetition_penalty must be {SMALLEST:g} to {LARGEST:g}, got {scale}")
    inside = [at for at in params.pinned if at < len(params.seed_canvas)]
    limit = sampling.max_tokens
    if inside and limit is not None and not params.read_only and max(inside) >= limit:
        problems.append(
            f"diffusion_pinned holds position {max(inside)}, which max_tokens={limit} cuts off"
        )
    return problems


def _about_ids(
    sampling: Any,  # noqa: ANN401
    params: DiffusionParams,
    banned: set[int],
) -> list[str]:
    """Ids that must be said and may not, or that are all that may be said."""
    problems = []
    asked = set(sampling.allowed_token_ids or ())
    if asked and sampling.min_tokens and asked - banned <= set(sampling.all_stop_token_ids):
        problems.append(
            f"min_tokens={sampling.min_tokens} forbids every one of the allowed_token_ids"
        )
    if params.constrained and not sampling.logprob_token_ids:
        problems.append("diffusion_constrained needs logprob_token_ids: they are the allowed set")
    if params.constrained and asked:
        problems.append("diffusion_constrained and allowed_token_ids both say what is allowed")
    allowed = set(sampling.logprob_token_ids or ()) if params.constrained else asked
    if allowed and allowed <= banned:
        problems.append(f"of the allowed ids {sorted(allowed)} this model may say none")
    pins = {at: params.seed_canvas[at] for at in params.pinned if at < len(params.seed_canvas)}
    outside = [
        at for at, token in pins.items() if token in banned or (allowed and token not in allowed)
    ]
    if outside:
        problems.append(
            f"diffusion_pinned holds tokens that are not allowed at {reprlib.repr(outside)}"
        )
    return problems
