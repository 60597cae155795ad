"""What the engine serves: the constants of its decoding rule, and where each comes from.

Of two places that name a constant the upper one wins:

    option of the request          request.requested_rule
    preset of the request          request.requested_rule; stands in for the preset below
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
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.denoise.constants import (
    EntropyBoundConstants,
    RuleConstants,
    ServedRules,
    declared,
    published,
    written,
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
    """What an engine serves, decided before it starts; every process of it knows."""

    canvas_length: int
    """The widest canvas a request may have, in rows."""
    rules: ServedRules
    family: Family
    """What the model declares."""
    head_memory_mb: int
    """What the logits of a step may take."""
    head_weights: HeadForm | None
    """What the head reads its matrix in; None for the matrix itself."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a config that is written as JSON."""
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
) -> tuple[ServedRules, dict[str, str]]:
    """The rules that requests may be denoised by, and who changed the default one.

    Args:
        checkpoint: the keys of ``generation_config.json``.
        source: where they came from, for the error message.
        override: vLLM's ``override_generation_config``.
        max_denoising_steps: of vLLM's ``diffusion_config``.
        additional: ``additional_config["diffusion"]``, whatever the user wrote there.
        kind: of the rule that the family was published with.

    Returns:
        The rules, and of every constant of the default one that is not the checkpoint's the option
        it comes from.

    Raises:
        CheckpointError: constants missing or out of range, or a sampler we do not know.
        ConfigError: options of ours that are unknown, malformed or contradict each other. Either
            message lists every problem and the way out.
    """
    generation, origins, wrong = _generation(checkpoint, override or {}, max_denoising_steps, kind)
    reference, missing = _reference(generation, kind)
    preset, options, malformed_options = _options(additional, kind)
    wrong += malformed_options
    rules = ServedRules(
        default=replace(reference, **{**PRESETS[preset], **options}),
        presets={
            name: replace(reference, **{**options, **constants})
            for name, constants in PRESETS.items()
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
    origins |= dict.fromkeys(PRESETS[preset], f"preset {preset}")
    origins |= dict.fromkeys(options, "additional_config")
    return rules, origins


def fused_commit(additional: object) -> bool:
    """Whether commits are fused where the engine can and the request does not say.

    Args:
        additional: ``additional_config["diffusion"]``, which ``served_rules`` has let through.
    """
    return bool(additional.get(_FUSED_COMMIT, True)) if isinstance(additional, dict) else True


def describe(rule: RuleConstants, origins: Mapping[str, str]) -> str:
    """A rule in one line, with the option that each changed constant comes from."""
    return ", ".join(
        f"{text} ({origins[name]})" if name in origins else text
        for name, text in written(rule).items()
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
    checkpoint: Mapping[str, Any],
    override: Mapping[str, Any],
    max_denoising_steps: int | None,
    kind: type[RuleConstants],
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The generation config with vLLM's options laid over it, who changed what, what is wrong."""
    constants = declared(kind)
    keys = {name: constants[name].key or name for name in published(kind)}
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
    generation: Mapping[str, Any], kind: type[RuleConstants]
) -> tuple[RuleConstants, list[str]]:
    """The published rule of a generation config, and what is missing or wrong with it.

    Where something is wrong, the rule holds the least value in its place.
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
    for name in published(kind):
        constant = constants[name]
        section, _, key = (constant.key or name).rpartition(".")
        values[name] = constant.least
        if section and section not in sections:
            continue
        value = (sections[section] if section else generation).get(key)
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
    """Preset and constants of ``additional_config["diffusion"]``, and what is wrong there."""
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
