"""The rules a tuning run tries: presets, constants from the user, neighbours of the best so far."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.denoise.constants import CONSTANTS, RuleConstants
from vllm_diffusion.errors import TuneError
from vllm_diffusion.request.options import PREFIX, malformed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_NAMES: Final = ("preset", *CONSTANTS)
_FACTORS: Final = (0.5, 2.0)


def parse_arm(text: str) -> dict[str, Any]:
    """``fast`` or ``preset=fast,entropy_bound=0.3`` as options of a request.

    Raises:
        TuneError: a name or value is not accepted; the message lists all of them.
    """
    options: dict[str, Any] = {}
    problems = []
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            name, value = "preset", name
        if name not in _NAMES:
            problems.append(f"unknown {name!r}; accepted: {', '.join(_NAMES)}")
            continue
        read = value if name == "preset" else _number(value)
        if expected := malformed(name, read):
            problems.append(f"{name} must be {expected}, got {value!r}")
        options[PREFIX + name] = read
    if problems:
        raise TuneError(f"the arm {text!r} cannot be tried: {'; '.join(problems)}")
    return options


def format_arm(options: Mapping[str, Any]) -> str:
    """Options of a request in the form that ``parse_arm`` reads; a preset by its bare name."""
    parts = {name.removeprefix(PREFIX): value for name, value in options.items()}
    preset = parts.pop("preset", None)
    constants = ",".join(
        f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}"
        for name, value in parts.items()
    )
    return ",".join(part for part in (preset, constants) if part)


def neighbours(options: Mapping[str, Any], rule: RuleConstants) -> Iterator[dict[str, Any]]:
    """Every rule with one constant halved or doubled, or with another of its choices.

    Args:
        options: the arm.
        rule: its constants as served. Constants that are 0 are off and stay off.
    """
    for name, value in asdict(rule).items():
        scaled = [] if isinstance(value, str) else [type(value)(value * f) for f in _FACTORS]
        for changed in (*scaled, *CONSTANTS[name].choices):
            if changed == value or malformed(name, changed) is not None:
                continue
            if replace(rule, **{name: changed}).incoherent():
                continue
            yield {**options, PREFIX + name: changed}


def _number(text: str) -> Any:  # noqa: ANN401 - a text that is no number stays one, and is refused
    try:
        return json.loads(text)
    except ValueError:
        return text
