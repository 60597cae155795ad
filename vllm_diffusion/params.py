"""DiffusionParams: what one request may set, and one error message that names every problem.

Takes the sampling parameters of vLLM's request (any object with their attributes) and gives frozen
records. Never changes the request, never imports vLLM. What each parameter means on a canvas stands
in docs/parameters.md.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion import fill
from vllm_diffusion.constrain.constraints import Constraints, Holes
from vllm_diffusion.denoise.constants import (
    CONSTANTS,
    LARGEST,
    SMALLEST,
    RuleConstants,
    ServedRules,
)
from vllm_diffusion.denoise.presets import PRESETS
from vllm_diffusion.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PREFIX: Final = "diffusion_"
"""Every option of ours in ``extra_args`` / ``vllm_xargs`` starts with this."""

GREEDY_SEED: Final = 0
"""The noise key of a request of temperature 0 that names no seed: its answer is always the same."""

_GREEDY_BELOW: Final = 1e-5  # vLLM's own border between sampling and greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionParams:
    """The diffusion options of a request; None leaves the served value."""

    preset: str | None = None
    """A rule by its name; the options beside it change it further."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Constants of the rule that the request sets, by name, see ``denoise.constants``."""
    canvas_length: int | None = None
    """Canvas width, at most the served one."""
    seed_canvas: tuple[int, ...] = ()
    """Token ids of the first input of the first canvas, one a position."""
    pinned: tuple[int, ...] = ()
    """Positions of the seed canvas whose token is given."""
    read_only: bool = False
    """One canvas is the whole answer. vLLM itself then caps max_tokens and ignores EOS."""
    constrained: bool = False
    """Only ``logprob_token_ids`` may be said."""
    text: fill.CanvasText | None = None
    """Text on the canvas, until it is rows: seed canvas, pins and ``holes``."""
    holes: Holes | None = None
    """Of a text with holes."""
    noise_level: float | None = None
    """Share of noise in the draft or seed canvas; None: the seed canvas as it is."""
    fused_commit: bool | None = None
    """A finished canvas is committed beside the first step of the next, where the engine can."""
    telemetry: bool = False
    """The answer says what its canvases took, see ``telemetry``."""


# The sampling parameters that have no meaning on a canvas yet, and when they are set.
_UNSUPPORTED: Final[dict[str, Callable[[Any], bool]]] = {
    "thinking_token_budget": lambda value: value is not None,
    "trace_decode_token_ids": bool,
}

_ALWAYS: Final = 1 << 32
"""Behind the last position of any output, above the last id of any vocabulary."""

_LISTS: Final = ("seed_canvas", "pinned")
_SWITCHES: Final = ("read_only", "constrained", "fused_commit", "telemetry")
_OPTIONS: Final = {
    f"{PREFIX}{field}": field
    for field in ("preset", "canvas_length", *CONSTANTS, *_LISTS, *_SWITCHES, *fill.OPTIONS)
}


def parse_params(
    sampling: Any,  # noqa: ANN401 - vLLM's SamplingParams by its attributes
    *,
    canvas_length: int | None = None,
    vocab_size: int | None = None,
    rules: ServedRules | None = None,
) -> DiffusionParams:
    """The diffusion options of a request, or one error listing everything that is wrong with it.

    Args:
        sampling: vLLM's ``SamplingParams``.
        canvas_length: the served canvas, None where it is not known yet.
        vocab_size: number of token ids, None where it is not known.
        rules: the served rules, None where they are not known.

    Raises:
        ParamsError: unsupported sampling parameters, wishes that exclude each other, unknown or
            malformed diffusion options.
    """
    unsupported = [
        f"{name}={reprlib.repr(value)}"
        for name, is_set in _UNSUPPORTED.items()
        if (value := getattr(sampling, name)) is not None and is_set(value)
    ]
    problems = []
    if unsupported:
        problems.append(
            f"not supported by this diffusion model yet: {', '.join(unsupported)} "
            "(leave them at their defaults)"
        )
    fields, wrong = _options(sampling.extra_args or {})
    params = DiffusionParams(**fields)
    problems += wrong
    problems += _against_served(params, canvas_length, vocab_size, rules)
    problems += _contradictions(sampling, params)
    if problems:
        raise ParamsError("; ".join(problems))
    return params


def admitted_params(extra_args: Mapping[str, Any] | None) -> DiffusionParams:
    """The options of a request that ``parse_params`` has let through; never raises.

    For the worker, where an exception would end the engine, and where vLLM's own warm-up requests
    arrive with whatever they like.
    """
    extra = extra_args or {}
    params = DiffusionParams(**_options(extra)[0])
    if (packed := extra.get(fill.ROWS)) is None:
        return params
    rows = fill.Rows.unpacked(packed)
    return replace(params, seed_canvas=rows.seed_canvas, pinned=rows.pinned, holes=rows.holes)


def requested_rule(params: DiffusionParams, served: ServedRules) -> RuleConstants:
    """The rule a request is denoised by: what it names, then its preset, then the served values."""
    base = served.default if params.preset is None else served.presets[params.preset]
    return replace(base, **params.constants)


def is_greedy(sampling: Any) -> bool:  # noqa: ANN401
    """Whether the request asks for temperature 0."""
    return bool(sampling.temperature < _GREEDY_BELOW)


def noise_seed(sampling: Any) -> int | None:  # noqa: ANN401
    """The seed that a request's noise is keyed by; None lets its request id decide."""
    if sampling.seed is None and is_greedy(sampling):
        return GREEDY_SEED
    return None if sampling.seed is None else int(sampling.seed)


def constraints(
    sampling: Any,  # noqa: ANN401
    params: DiffusionParams,
) -> Constraints:
    """What an admitted request changes in the distribution of its canvases; never raises.

    Args:
        sampling: vLLM's ``SamplingParams``, completed with the model's and the tokenizer's ids.
        params: its diffusion options.
    """
    allowed = sampling.logprob_token_ids if params.constrained else sampling.allowed_token_ids
    until = dict.fromkeys(sampling.all_stop_token_ids, sampling.min_tokens)
    if params.pinned:
        # An answer that stops before its last pin would lack it.
        ending = {*(sampling.stop_token_ids or ()), sampling.eos_token_id} - {None}
        behind = max(params.pinned) + 1
        until |= {token: max(behind, until.get(token, 0)) for token in ending}
    bad_words = tuple(tuple(word) for word in sampling.bad_words_token_ids or ())
    if sampling.structured_outputs is not None:
        # Words are repaired where a canvas ends, which knows nothing of its constraint. Those of
        # one token, and there are no others, are tokens that never stand anywhere.
        until |= {word[0]: _ALWAYS for word in bad_words}
        bad_words = ()
    return Constraints(
        temperature=0.0 if is_greedy(sampling) else sampling.temperature,
        min_p=sampling.min_p,
        # Above every vocabulary it keeps all ids, and a tensor of 64 bits does not hold any number.
        top_k=min(max(0, sampling.top_k), _ALWAYS),
        top_p=sampling.top_p,
        allowed=tuple(dict.fromkeys(allowed or ())),
        bias=tuple((int(token), float(b)) for token, b in (sampling.logit_bias or {}).items()),
        repetition=sampling.repetition_penalty,
        frequency=sampling.frequency_penalty,
        presence=sampling.presence_penalty,
        early=tuple(sorted((token, last) for token, last in until.items() if last > 0)),
        bad_words=bad_words,
        seed_canvas=params.seed_canvas,
        pinned=params.pinned,
        holes=params.holes,
    )


def _options(extra: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options among ``extra`` as fields of DiffusionParams, and what is wrong with them."""
    fields: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    problems = []
    for name, value in extra.items():
        if not name.startswith(PREFIX):
            continue
        field = _OPTIONS.get(name)
        if field is None:
            problems.append(f"unknown option {name!r}; accepted: {', '.join(_OPTIONS)}")
        elif wrong := malformed(field, value):
            problems.append(f"{name} must be {wrong}, got {reprlib.repr(value)}")
        elif field in fill.TEXTS:
            texts[field] = tuple(value) if field == "template" else value
        elif field in CONSTANTS:
            constants[field] = value
        elif field in _LISTS:
            fields[field] = tuple(value)
        else:
            fields[field] = bool(value) if field in _SWITCHES else value
    if constants:
        fields["constants"] = constants
    if texts:
        fields["text"] = fill.CanvasText(**texts)
    return fields, problems


def malformed(field: str, value: Any) -> str | None:  # noqa: ANN401 - whatever a client sent
    """What the value of an option must be, if it is something else."""
    if field == "preset":
        known = isinstance(value, str) and value in PRESETS
        return None if known else f"one of {', '.join(PRESETS)}"
    if field in CONSTANTS:
        return CONSTANTS[field].expected(value)
    if field == "canvas_length":
        return None if _is_integer(value) and value > 0 else "a positive integer"
    if field in fill.OPTIONS:
        return fill.malformed(field, value)
    if field in _LISTS:
        integers = isinstance(value, list | tuple) and all(_is_integer(v) for v in value)
        fine = integers and min(value, default=0) >= 0 and (value or field != "seed_canvas")
        return None if fine else "a list of integers of at least 0"
    # Over HTTP a boolean arrives as 0 or 1.
    return None if isinstance(value, int) and value in {0, 1} else "a boolean (or 0/1)"


def _is_integer(value: Any) -> bool:  # noqa: ANN401 - whatever a client sent
    return isinstance(value, int) and not isinstance(value, bool)


def _against_served(
    params: DiffusionParams,
    canvas_length: int | None,
    vocab_size: int | None,
    rules: ServedRules | None,
) -> list[str]:
    """What the engine, as it is served, cannot give."""
    problems = []
    width = params.canvas_length or canvas_length
    if canvas_length and params.canvas_length and params.canvas_length > canvas_length:
        problems.append(
            f"diffusion_canvas_length must not exceed the served canvas of {canvas_length}, "
            f"got {params.canvas_length}"
        )
    if params.seed_canvas and width and len(params.seed_canvas) != width:
        problems.append(
            f"diffusion_seed_canvas must hold exactly {width} ids, got {len(params.seed_canvas)}"
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
    rule = requested_rule(params, rules)
    if rule.remembered > rules.remembered:
        problems.append(
            f"diffusion_stability_threshold must be at most the served {rules.remembered}, "
            f"got {rule.remembered}"
        )
    return problems + rule.incoherent(beside=rules.default, prefix=PREFIX)


def _contradictions(
    sampling: Any,  # noqa: ANN401
    params: DiffusionParams,
) -> list[str]:
    """Wishes of one request that cannot all come true."""
    text = params.text or fill.CanvasText()
    problems = fill.contradictions(
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
    allowed = set(sampling.allowed_token_ids or ())
    if allowed and sampling.min_tokens and allowed <= set(sampling.all_stop_token_ids):
        problems.append(
            f"min_tokens={sampling.min_tokens} forbids every one of the allowed_token_ids"
        )
    if params.constrained and not sampling.logprob_token_ids:
        problems.append("diffusion_constrained needs logprob_token_ids: they are the allowed set")
    if params.constrained and allowed:
        problems.append("diffusion_constrained and allowed_token_ids both say what is allowed")
    if params.constrained:
        allowed = set(sampling.logprob_token_ids or ())
    inside = [at for at in params.pinned if at < len(params.seed_canvas)]
    if allowed and (outside := [at for at in inside if params.seed_canvas[at] not in allowed]):
        problems.append(
            f"diffusion_pinned holds tokens that are not allowed at {reprlib.repr(outside)}"
        )
    limit = sampling.max_tokens
    if inside and limit is not None and not params.read_only and max(inside) >= limit:
        problems.append(
            f"diffusion_pinned holds position {max(inside)}, which max_tokens={limit} cuts off"
        )
    return problems
