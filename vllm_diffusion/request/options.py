"""What one request may set: every diffusion option, what its value may be, and reading them.

Takes what stands in a request's ``extra_args`` (``vllm_xargs`` over HTTP), gives a frozen record.
``parse`` says whether a request may have them together.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.denoise.constants import CONSTANTS, RuleConstants, ServedRules, declared
from vllm_diffusion.denoise.presets import preset_names
from vllm_diffusion.request.text import TEXT_OPTIONS, TEXTS, CanvasText, malformed_text

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX: Final = "diffusion_"
"""Every option of ours in ``extra_args`` / ``vllm_xargs`` starts with this."""


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
    text: CanvasText | None = None
    """Text on the canvas."""
    noise_level: float | None = None
    """Share of noise in the draft or seed canvas; None: the seed canvas as it is."""
    fused_commit: bool | None = None
    """A finished canvas is committed beside the first step of the next, where the engine can."""
    approximate_prefix: bool = False
    """Text that sees its canvas is computed once a canvas, not in every step: an approximation."""
    telemetry: bool = False
    """The answer says what its canvases took, see ``telemetry``."""


_LISTS: Final = ("seed_canvas", "pinned")
_SWITCHES: Final = ("read_only", "constrained", "fused_commit", "approximate_prefix", "telemetry")
OPTIONS: Final = {
    f"{PREFIX}{name}": name
    for name in ("preset", "canvas_length", *CONSTANTS, *_LISTS, *_SWITCHES, *TEXT_OPTIONS)
}
"""Names of the options as a client writes them, and of the fields they set."""


def foreign_constants(params: DiffusionParams, served: ServedRules) -> list[str]:
    """What is wrong with a request that names constants of a rule other than the served one."""
    own = declared(type(served.default))
    if not (foreign := [f"{PREFIX}{name}" for name in params.constants if name not in own]):
        return []
    rule, accepted = served.default.kind, ", ".join(f"{PREFIX}{name}" for name in own)
    of = f"not of this model's decoding rule, {rule}, which has {accepted}"
    return [f"{', '.join(foreign)}: {of}"]


def requested_rule(params: DiffusionParams, served: ServedRules) -> RuleConstants:
    """The rule a request is denoised by: what it names, then its preset, then the served values.

    Its constants are of the served kind, see ``foreign_constants``.
    """
    base = served.default if params.preset is None else served.presets[params.preset]
    return replace(base, **params.constants)


def read_options(
    extra: Mapping[str, Any], served: ServedRules | None = None
) -> tuple[DiffusionParams, list[str]]:
    """The well-formed options among ``extra``, and what is wrong with the others.

    Args:
        extra: what a client sent.
        served: the rules of the engine; None names the options of all kinds of rules.
    """
    fields: dict[str, Any] = {}
    texts: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    problems = []
    for name, value in extra.items():
        if not name.startswith(PREFIX):
            continue
        field = OPTIONS.get(name)
        if field is None:
            problems.append(f"unknown option {name!r}; accepted: {', '.join(_accepted(served))}")
        elif wrong := malformed(field, value):
            problems.append(f"{name} must be {wrong}, got {reprlib.repr(value)}")
        elif field in TEXTS:
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
        fields["text"] = CanvasText(**texts)
    return DiffusionParams(**fields), problems


def _accepted(served: ServedRules | None) -> list[str]:
    """Names of the options that an engine accepts."""
    own = CONSTANTS if served is None else declared(type(served.default))
    return [name for name, field in OPTIONS.items() if field not in CONSTANTS or field in own]


def malformed(field: str, value: Any) -> str | None:  # noqa: ANN401 - whatever a client sent
    """What the value of an option must be, if it is something else."""
    if field == "preset":
        known = isinstance(value, str) and value in preset_names()
        return None if known else f"one of {', '.join(preset_names())}"
    if field in CONSTANTS:
        return CONSTANTS[field].expected(value)
    if field == "canvas_length":
        return None if _is_integer(value) and value > 0 else "a positive integer"
    if field in TEXT_OPTIONS:
        return malformed_text(field, value)
    if field in _LISTS:
        integers = isinstance(value, list | tuple) and all(_is_integer(v) for v in value)
        fine = integers and min(value, default=0) >= 0 and (value or field != "seed_canvas")
        return None if fine else "a list of integers of at least 0"
    # Over HTTP a boolean arrives as 0 or 1.
    return None if isinstance(value, int) and value in {0, 1} else "a boolean (or 0/1)"


def _is_integer(value: Any) -> bool:  # noqa: ANN401 - whatever a client sent
    return isinstance(value, int) and not isinstance(value, bool)
