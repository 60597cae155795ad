"""What the engine serves: the constants of its decoding rule, and where each comes from.

Of two places that name a constant the upper one wins:

    option of the request          params.requested_rule
    preset of the request          params.requested_rule; stands in for the preset below
    additional_config              {"diffusion": {"t_max": 0.9}}, our options for every request
    preset of additional_config    {"diffusion": {"preset": "fast"}}
    diffusion_config               {"max_denoising_steps": 24}, vLLM's own
    override_generation_config     {"t_max": 0.9}, vLLM's own
    generation_config.json         of the checkpoint

The last three are the published rule, ``reference``: vLLM's options say what the model is, ours
what a request is given. A constant that nobody names is missing, never guessed: engines that
shipped built-in values for the same model disagree with each other. What is missing or wrong is
refused at start, all problems in one message.
"""

from __future__ import annotations

import reprlib
from dataclasses import MISSING, asdict, fields, replace
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.denoise.presets import PRESETS, REFERENCE
from vllm_diffusion.errors import CheckpointError, ConfigError
from vllm_diffusion.head.quantised import HEAD_FORMS
from vllm_diffusion.params import LARGEST, MAX_STEPS, SMALLEST, malformed
from vllm_diffusion.records import RuleConstants, ServedRules

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.head.quantised import HeadForm

SAMPLER_CLASS: Final = "EntropyBoundSamplerConfig"

_CONSTANTS: Final = tuple(RuleConstants.__dataclass_fields__)
_PUBLISHED: Final = tuple(field.name for field in fields(RuleConstants) if field.default is MISSING)
_FUSED_COMMIT: Final = "fused_commit"

HEAD_MEMORY: Final = "head_memory_mb"
_HEAD_MEMORY_MB: Final = 256

HEAD_WEIGHTS: Final = "head_weights"
_EXACT: Final = "exact"

# Constants that a generation config calls otherwise, or holds elsewhere.
_IN_GENERATION: Final = {
    "max_steps": "max_denoising_steps",
    "entropy_bound": "sampler_config.entropy_bound",
}


def served_rules(
    checkpoint: Mapping[str, Any],
    *,
    source: str,
    override: Mapping[str, Any] | None = None,
    max_denoising_steps: int | None = None,
    additional: object = None,
) -> tuple[ServedRules, dict[str, str]]:
    """The rules that requests may be denoised by, and who changed the default one.

    Args:
        checkpoint: the keys of ``generation_config.json``.
        source: where they came from, for the error message.
        override: vLLM's ``override_generation_config``.
        max_denoising_steps: of vLLM's ``diffusion_config``.
        additional: ``additional_config["diffusion"]``, whatever the user wrote there.

    Returns:
        The rules, and of every constant of the default one that is not the checkpoint's the option
        it comes from.

    Raises:
        CheckpointError: constants missing or out of range, or a sampler we do not know.
        ConfigError: options of ours that are unknown, malformed or contradict each other. Either
            message lists every problem and the way out.
    """
    generation, origins, wrong = _generation(checkpoint, override or {}, max_denoising_steps)
    published, missing = _published(generation)
    preset, options, malformed_options = _options(additional)
    wrong += malformed_options
    rules = ServedRules(
        default=replace(published, **{**PRESETS[preset], **options}),
        presets={
            name: replace(published, **{**options, **constants})
            for name, constants in PRESETS.items()
        }
        | {REFERENCE: published},
    )
    if not missing:
        every = (rules.default, *rules.presets.values())
        wrong += dict.fromkeys(problem for rule in every for problem in _incoherent(rule))
    messages = []
    if missing:
        messages.append(
            f"{source} does not give the constants of the decoding rule: {'; '.join(missing)}. "
            "Serve the checkpoint with its own generation_config.json (--generation-config auto), "
            "or pass the values with --override-generation-config."
        )
    if wrong:
        messages.append(f"The engine's options cannot be served: {'; '.join(wrong)}.")
    if messages:
        raise (CheckpointError if missing else ConfigError)(" ".join(messages))
    origins |= dict.fromkeys(PRESETS[preset], f"preset {preset}")
    origins |= dict.fromkeys(options, "additional_config")
    return rules, origins


def fused_commit(additional: object) -> bool:
    """Whether commits are fused where the engine can and the request does not say, see `params`.

    Args:
        additional: ``additional_config["diffusion"]``, which ``served_rules`` has let through.
    """
    return bool(additional.get(_FUSED_COMMIT, True)) if isinstance(additional, dict) else True


def describe(rule: RuleConstants, origins: Mapping[str, str]) -> str:
    """A rule in one line, with the option that each changed constant comes from."""
    return ", ".join(
        f"{name}={value}" + (f" ({origins[name]})" if name in origins else "")
        for name, value in asdict(rule).items()
    )


def head_memory(additional: object) -> int:
    """MB that a step's logits may take, of options that ``served_rules`` has let through."""
    named = additional.get(HEAD_MEMORY) if isinstance(additional, dict) else None
    return int(named or _HEAD_MEMORY_MB)


def head_weights(additional: object) -> HeadForm | None:
    """What the head reads its matrix in, None for the matrix itself; see ``head_memory``."""
    named = additional.get(HEAD_WEIGHTS) if isinstance(additional, dict) else None
    return next((form for form in HEAD_FORMS if form == named), None)


def _generation(
    checkpoint: Mapping[str, Any], override: Mapping[str, Any], max_denoising_steps: int | None
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The generation config with vLLM's options laid over it, who changed what, what is wrong."""
    generation = {**checkpoint, **override}
    problems = [
        f"override_generation_config names {name}, which a generation config calls {theirs}"
        for name, theirs in _IN_GENERATION.items()
        if name in override
    ] + [
        f"override_generation_config names {name}, which no published rule has; "
        "additional_config sets it"
        for name in _CONSTANTS
        if name in override and name not in _PUBLISHED
    ]
    asked, own = override.get("sampler_config"), checkpoint.get("sampler_config")
    if isinstance(asked, dict):
        if isinstance(own, dict):
            generation["sampler_config"] = {**own, **asked}
        if unknown := asked.keys() - {"_cls_name", "entropy_bound"}:
            problems.append(
                f"override_generation_config: sampler_config has no {', '.join(sorted(unknown))}; "
                "accepted: entropy_bound"
            )
    flat = {**override, **({f"sampler_config.{key}": 0 for key in asked} if asked else {})}
    origins = {
        name: "override_generation_config"
        for name in _PUBLISHED
        if _IN_GENERATION.get(name, name) in flat
    }
    if max_denoising_steps is not None:
        generation["max_denoising_steps"] = max_denoising_steps
        origins["max_steps"] = "diffusion_config"
    return generation, origins, problems


def _published(generation: Mapping[str, Any]) -> tuple[RuleConstants, list[str]]:
    """The constants of a generation config, and what is missing or wrong with them."""
    problems: list[str] = []

    def number(values: Mapping[str, Any], key: str, *, integral: bool, minimum: float) -> float:
        value = values.get(key)
        kind = "an integer" if integral else "a finite number"
        limit = MAX_STEPS if integral else LARGEST
        accepted = (int,) if integral else (int, float)
        if value is None:
            problems.append(f"{key} is missing")
        elif isinstance(value, bool) or not isinstance(value, accepted):
            problems.append(f"{key} must be {kind}, got {value!r}")
        elif not value >= minimum:  # NaN is not either
            problems.append(f"{key} must be at least {minimum}, got {value!r}")
        elif value > limit:
            problems.append(f"{key} must be {kind} of at most {limit:g}, got {value!r}")
        else:
            return value
        return minimum

    sampler = generation.get("sampler_config")
    if not isinstance(sampler, dict) or sampler.get("_cls_name") != SAMPLER_CLASS:
        got = sampler.get("_cls_name") if isinstance(sampler, dict) else sampler
        problems.append(f"sampler_config must be of class {SAMPLER_CLASS}, got {got!r}")
        bound = 0.0
    else:
        bound = number(sampler, "entropy_bound", integral=False, minimum=0.0)

    constants = RuleConstants(
        max_steps=int(number(generation, "max_denoising_steps", integral=True, minimum=1)),
        t_min=number(generation, "t_min", integral=False, minimum=0.0),
        t_max=number(generation, "t_max", integral=False, minimum=0.0),
        entropy_bound=bound,
        confidence_threshold=number(
            generation, "confidence_threshold", integral=False, minimum=0.0
        ),
        stability_threshold=int(
            number(generation, "stability_threshold", integral=True, minimum=0)
        ),
    )
    return constants, problems or _incoherent(constants)


def _incoherent(rule: RuleConstants) -> list[str]:
    """Why the temperatures of a rule make no ramp, if they make none."""
    if rule.t_max < rule.t_min:
        return [f"t_max ({rule.t_max}) must not be below t_min ({rule.t_min})"]
    if rule.t_max < SMALLEST:
        least = f"t_max must be at least {SMALLEST:g}"
        return [f"{least}: logits are divided by the temperature, got {rule.t_max}"]
    return []


def _options(additional: object) -> tuple[str, dict[str, Any], list[str]]:
    """Preset and constants of ``additional_config["diffusion"]``, and what is wrong there."""
    if additional is None:
        return REFERENCE, {}, []
    where = 'additional_config["diffusion"]'
    if not isinstance(additional, dict):
        return REFERENCE, {}, [f"{where} must be an object, got {reprlib.repr(additional)}"]
    problems, options = [], {}
    for name, value in additional.items():
        if name == "canvas_length":
            problems.append(f"{where} names canvas_length, which --diffusion-config sets")
        elif name == HEAD_MEMORY:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                problems.append(f"{name} must be a positive integer, got {reprlib.repr(value)}")
        elif name == HEAD_WEIGHTS:
            if value not in (forms := (_EXACT, *HEAD_FORMS)):
                accepted = ", ".join(forms)
                problems.append(f"{name} must be one of {accepted}, got {reprlib.repr(value)}")
        elif name not in {"preset", _FUSED_COMMIT, *_CONSTANTS}:
            accepted = ", ".join(("preset", *_CONSTANTS, _FUSED_COMMIT, HEAD_MEMORY, HEAD_WEIGHTS))
            problems.append(f"{where} has no {name!r}; accepted: {accepted}")
        elif expected := malformed(name, value):
            problems.append(f"{name} must be {expected}, got {reprlib.repr(value)}")
        elif name != _FUSED_COMMIT:
            options[name] = value
    return options.pop("preset", REFERENCE), options, problems
