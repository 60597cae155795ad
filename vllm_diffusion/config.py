"""What the engine takes from a checkpoint: the constants of its decoding rule.

A constant that belongs to a checkpoint is read from its ``generation_config.json``, never guessed:
engines that shipped built-in values for the same model disagree with each other. A missing or wrong
one is refused at start, all problems in one message.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.records import RuleConstants

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLER_CLASS: Final = "EntropyBoundSamplerConfig"


def rule_constants(generation: Mapping[str, Any], *, source: str) -> RuleConstants:
    """The decoding rule's constants from a generation config.

    Args:
        generation: the keys of ``generation_config.json``, overrides already merged in.
        source: where they came from, for the error message.

    Raises:
        CheckpointError: constants missing or out of range, or a sampler we do not know; the message
            lists every problem and the way out.
    """
    problems: list[str] = []

    def number(values: Mapping[str, Any], key: str, *, integral: bool, minimum: float) -> float:
        value = values.get(key)
        kind = "an integer" if integral else "a finite number"
        accepted = (int,) if integral else (int, float)
        if value is None:
            problems.append(f"{key} is missing")
        elif isinstance(value, bool) or not isinstance(value, accepted) or not isfinite(value):
            problems.append(f"{key} must be {kind}, got {value!r}")
        elif value < minimum:
            problems.append(f"{key} must be at least {minimum}, got {value!r}")
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
    if not problems and constants.t_max < constants.t_min:
        problems.append(f"t_max ({constants.t_max}) must not be below t_min ({constants.t_min})")
    elif not problems and constants.t_max == 0:
        problems.append("t_max must be above 0: logits are divided by the temperature, got 0")
    if problems:
        raise CheckpointError(
            f"{source} does not give the constants of the decoding rule: {'; '.join(problems)}. "
            "Serve the checkpoint with its own generation_config.json (--generation-config auto), "
            "or pass the values with --override-generation-config."
        )
    return constants
