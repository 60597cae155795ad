"""Engine options and the constants of the decoding rule: which source sets each.

If several sources name a constant, the one listed first wins:

    option of the request          request.requested_rule
    preset of the request          request.requested_rule; replaces the preset below
    additional_config              {"diffusion": {"t_max": 0.9}}, our options for every request
    preset of additional_config    {"diffusion": {"preset": "fast"}}
    diffusion_config               {"max_denoising_steps": 24}, vLLM's own
    override_generation_config     {"t_max": 0.9}, vLLM's own
    generation_config.json         of the checkpoint
    family.published               named with its source by the family, where no file has it

The last four define the published rule, ``reference``: vLLM's options describe the model, ours
change what requests get. A constant that no source sets is an error and is never given a built-in
value: engines that shipped built-in values for the same model disagree with each other. Everything
missing or wrong is refused at start, in one message.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.denoise.constants import (
    EntropyBoundConstants,
    RuleConstants,
    ServedRules,
    declared,
    formatted,
    required,
)
from vllm_diffusion.denoise.presets import PRESETS, REFERENCE
from vllm_diffusion.errors import CheckpointError, ConfigError
from vllm_diffusion.family import Family
from vllm_diffusion.head.output_copy import HEAD_FORMS
from vllm_diffusion.request.options import malformed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.head.output_copy import HeadForm

_FUSED_COMMIT: Final = "fused_commit"

HEAD_MEMORY: Final = "head_memory_mb"
_HEAD_MEMORY_MB: Final = 256

HEAD_WEIGHTS: Final = "head_weights"
_EXACT: Final = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What an engine serves. Decided before it starts and known to all its processes."""

    canvas_length: int
    """The widest canvas a request may have, in rows."""
    rules: ServedRules
    family: Family
    """What the model declares."""
    head_memory_mb: int
    """Memory limit for the logits of a step, in MB."""
    head_weights: HeadForm | None
    """Format of the copy of the output matrix that the head reads; None for the matrix itself."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that can be written as JSON."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**values, "family": self.family.to_dict(), "rules": self.rules.to_dict()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Served:
        """Read what ``to_dict`` wrote."""
        family = Family.from_dict(values["family"])
        return Served(
            **{
                **values,
                "family": family,
                "rules": ServedRules.from_dict(values["rules"]),
            }
        )


def served_rules(
    checkpoint: Mapping[str, Any],
    *,
    source: str,
    override: Mapping[str, Any] | None = None,
    max_denoising_steps: int | None = None,
    additional: object = None,
    kind: type[RuleConstants] = EntropyBoundConstants,
    published: Mapping[str, Any] | None = None,
) -> tuple[ServedRules, dict[str, str]]:
    """The decoding rules that requests may use, and where the default rule's constants come from.

    Args:
        checkpoint: the keys of ``generation_config.json``.
        source: where they were read from, for the error message.
        override: vLLM's ``override_generation_config``.
        max_denoising_steps: of vLLM's ``diffusion_config``.
        additional: ``additional_config["diffusion"]``, unchecked.
        kind: kind of the rule that the family was published with.
        published: its constants by name that no file of a checkpoint gives, ``Family.published``.

    Returns:
        The rules; and, for each constant of the default rule that an option set, that option.

    Raises:
        CheckpointError: constants missing or out of range, or an unknown sampler.
        ConfigError: options of ours that are unknown, malformed or contradict each other. Either
            message lists every problem and the way out.
    """
    generation, origins, wrong = _generation(checkpoint, override or {}, max_denoising_steps, kind)
    reference, missing = _reference(generation, kind, published or {})
    preset, options, malformed_options = _options(additional, kind)
    wrong += malformed_options
    presets = PRESETS[kind.kind]
    rules = ServedRules(
        default=replace(reference, **{**presets[preset], **options}),
        presets={
            name: replace(reference, **{**options, **constants})
            for name, constants in presets.items()
        }
        | {REFERENCE: reference},
    )
    if not missing:
        every = (rules.default, *rules.presets.values())
        wrong += dict.fromkeys(problem for rule in every for problem in rule.incoherent())
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
    origins |= dict.fromkeys(presets[preset], f"preset {preset}")
    origins |= dict.fromkeys(options, "additional_config")
    return rules, origins


def fused_commit(additional: object) -> bool:
    """Whether commits are fused by default, for requests that do not set it.

    Args:
        additional: ``additional_config["diffusion"]``, already checked by ``served_rules``.
    """
    return bool(additional.get(_FUSED_COMMIT, True)) if isinstance(additional, dict) else True


def describe(rule: RuleConstants, origins: Mapping[str, str]) -> str:
    """A rule on one line, with the option that set each changed constant."""
    return ", ".join(
        f"{text} ({origins[name]})" if name in origins else text
        for name, text in formatted(rule).items()
    )


def head_memory(additional: object) -> int:
    """Memory limit for a step's logits in MB, from options that ``served_rules`` has checked."""
    named = additional.get(HEAD_MEMORY) if isinstance(additional, dict) else None
    return int(named or _HEAD_MEMORY_MB)


def head_weights(additional: object) -> HeadForm | None:
    """Format of the head's copy of its matrix, None for no copy; options as in ``head_memory``."""
    named = additional.get(HEAD_WEIGHTS) if isinstance(additional, dict) else None
    return next((form for form in HEAD_FORMS if form == named), None)


def _generation(
    checkpoint: Mapping[str, Any],
    override: Mapping[str, Any],
    max_denoising_steps: int | None,
    kind: type[RuleConstants],
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The generation config with vLLM's options applied, their origins, and all problems."""
    constants = declared(kind)
    keys = {name: constants[name].key or name for name in required(kind)}
    generation = {**checkpoint, **override}
    problems = [
        f"override_generation_config names {name}, which a generation config calls {key}"
        for name, key in keys.items()
        if name in override and name != key
    ] + [
        f"override_generation_config names {name}, which no published rule has; "
        "additional_config sets it"
        for name in constants
        if name in override and name not in keys
    ]
    flat = {*override}
    for section in kind.sections:
        asked, own = override.get(section), checkpoint.get(section)
        if not isinstance(asked, dict):
            continue
        if isinstance(own, dict):
            generation[section] = {**own, **asked}
        inside = {key.removeprefix(f"{section}.") for key in keys.values() if section in key}
        if unknown := asked.keys() - {"_cls_name", *inside}:
            problems.append(
                f"override_generation_config: {section} has no {', '.join(sorted(unknown))}; "
                f"accepted: {', '.join(sorted(inside))}"
            )
        flat |= {f"{section}.{key}" for key in asked}
    origins = {name: "override_generation_config" for name, key in keys.items() if key in flat}
    if max_denoising_steps is not None:
        generation[keys["max_steps"]] = max_denoising_steps
        origins["max_steps"] = "diffusion_config"
    return generation, origins, problems


def _reference(
    generation: Mapping[str, Any], kind: type[RuleConstants], published: Mapping[str, Any]
) -> tuple[RuleConstants, list[str]]:
    """The published rule of a generation config, and all problems found in it.

    A constant with a problem gets its least accepted value.

    Args:
        generation: the keys of the config.
        kind: of the rule.
        published: values of the constants that the config lacks.
    """
    constants, problems = declared(kind), []
    values: dict[str, Any] = {}
    sections: dict[str, Mapping[str, Any]] = {}
    for section, class_name in kind.sections.items():
        found = generation.get(section)
        if isinstance(found, dict) and found.get("_cls_name") == class_name:
            sections[section] = found
        else:
            got = found.get("_cls_name") if isinstance(found, dict) else found
            problems.append(f"{section} must be of class {class_name}, got {got!r}")
    for name in required(kind):
        constant = constants[name]
        section, _, key = (constant.key or name).rpartition(".")
        values[name] = constant.stand_in
        if section and section not in sections:
            continue
        value = (sections[section] if section else generation).get(key, published.get(name))
        if value is None:
            problems.append(f"{key} is missing")
        elif expected := constant.expected(value):
            problems.append(f"{key} must be {expected}, got {value!r}")
        else:
            values[name] = value
    rule = kind(
        **{
            name: int(value) if constants[name].integral else value
            for name, value in values.items()
        }
    )
    return rule, problems or rule.incoherent()


def _options(
    additional: object, kind: type[RuleConstants]
) -> tuple[str, dict[str, Any], list[str]]:
    """Preset and constants of ``additional_config["diffusion"]``, and all problems found there."""
    if additional is None:
        return REFERENCE, {}, []
    where = 'additional_config["diffusion"]'
    if not isinstance(additional, dict):
        return REFERENCE, {}, [f"{where} must be an object, got {reprlib.repr(additional)}"]
    problems, options, constants = [], {}, declared(kind)
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
        elif name not in {"preset", _FUSED_COMMIT, *constants}:
            accepted = ", ".join(("preset", *constants, _FUSED_COMMIT, HEAD_MEMORY, HEAD_WEIGHTS))
            problems.append(f"{where} has no {name!r}; accepted: {accepted}")
        elif expected := malformed(name, value):
            problems.append(f"{name} must be {expected}, got {reprlib.repr(value)}")
        elif name != _FUSED_COMMIT:
            options[name] = value
    return options.pop("preset", REFERENCE), options, problems
