"""The constants of decoding rules, each declared once.

A rule's constants are a frozen record, and each constant is a field with metadata: unit, bounds,
meaning, and its name in a generation config. Options of requests and of the engine, the tensors of
the canvas pool, traces, error messages and the table in docs/options.md are derived from it, so a
new constant touches two files: this one and the rule that reads it.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping


MAX_STEPS: Final = 1024
"""Most denoising steps of a canvas. Published rules take 48; the limit bounds a slot's use."""

LARGEST: Final = 1e6
"""Largest accepted temperature or number of nats; far below the overflow of fp32."""

SMALLEST: Final = 1 / LARGEST
"""Smallest accepted divisor of logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """Metadata of a constant."""

    help: str
    """One line for documentation."""
    unit: str = ""
    """Empty for a plain number."""
    integral: bool = False
    least: float = 0.0
    most: float = LARGEST
    because: str | None = None
    """Why nothing below ``least`` is accepted, where that is not obvious."""
    off: str | None = None
    """Meaning of 0, if 0 is accepted although it is below ``least``; else None."""
    key: str | None = None
    """Dotted name in a generation config; None if no checkpoint gives it."""
    exact: bool = False
    """The pool holds it in fp64."""
    choices: tuple[str, ...] = ()
    """Its values, where it is one of several names; the pool holds the place of a name here."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the pool's tensor."""
        if self.integral or self.choices:
            return torch.int64
        return torch.float64 if self.exact else torch.float32

    @property
    def stand_in(self) -> float | str:
        """An accepted value, for where none is given."""
        return self.choices[0] if self.choices else self.least

    def held(self, value: float | str) -> float:
        """An accepted value as the pool holds it."""
        return self.choices.index(value) if isinstance(value, str) else value

    def expected(self, value: object) -> str | None:
        """What a rejected value should have been; None if the value is accepted."""
        if self.choices:
            fits = isinstance(value, str) and value in self.choices
            return None if fits else f"one of {', '.join(self.choices)}"
        number = isinstance(value, int if self.integral else int | float)
        if not number or isinstance(value, bool):
            return self._accepted()
        assert isinstance(value, int | float)
        if self.off is not None:
            return None if value == 0 or self.least <= value <= self.most else self._accepted()
        if value > self.most:
            most = f"at most {self.most:g}"
            return most if self.integral else f"a finite number of {most}"
        return None if value >= self.least else self._accepted()  # rejects NaN too

    def _accepted(self) -> str:
        if self.off is not None:
            return f"0 for {self.off}, or an integer from {self.least:g} to {self.most:g}"
        if self.integral:
            return "a positive integer" if self.least == 1 else "an integer of at least 0"
        reason = "" if self.because is None else f" ({self.because})"
        return f"a finite number of at least {self.least:g}{reason}"


def declare(constant: Constant, *, default: float | str | None = None) -> Any:  # noqa: ANN401 - a field
    """A dataclass field for a constant; without a default checkpoint or family must give it."""
    given: Any = MISSING if default is None else default
    return field(default=given, metadata={Constant.__name__: constant})


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConstants:
    """Base of every rule's constants (host side).

    Constants without a default belong to the published rule. Every other constant defaults to off.
    """

    kind: ClassVar[str]
    """Name of the rule, a key of ``KINDS``."""
    sections: ClassVar[Mapping[str, str]] = {}
    """Sections of a generation config that hold constants, and the class that each must name."""

    max_steps: int = declare(
        Constant(
            help="The most denoising steps a canvas may take; the rule's schedule follows it.",
            unit="steps",
            integral=True,
            least=1,
            most=MAX_STEPS,
            key="max_denoising_steps",
        )
    )

    @property
    def remembered(self) -> int:
        """Number of previous steps whose argmax the rule needs."""
        return 0

    def incoherent(self, *, beside: RuleConstants | None = None, prefix: str = "") -> list[str]:
        """Problems of these values in combination; empty if there are none.

        Args:
            beside: the served rule, if a request changes it.
            prefix: prefix of the constants' names in the messages.
        """
        del beside, prefix
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBoundConstants(RuleConstants):
    """Constants of ``rules.entropy_bound``: the published rule of DiffusionGemma and additions."""

    kind: ClassVar[str] = "entropy_bound"
    sections: ClassVar[Mapping[str, str]] = {"sampler_config": "EntropyBoundSamplerConfig"}

    t_min: float = declare(
        Constant(
            help="Temperature at the end of the ramp, before `temperature` scales it.",
            key="t_min",
            exact=True,  # see ``schedule.linear_temperature``
        )
    )
    t_max: float = declare(
        Constant(
            help="Temperature of the first step, before `temperature` scales it.",
            least=SMALLEST,
            because="logits are divided by it",
            key="t_max",
            exact=True,
        )
    )
    entropy_bound: float = declare(
        Constant(
            help="Bound on the joint entropy of the tokens accepted in one step.",
            unit="nats",
            key="sampler_config.entropy_bound",
        )
    )
    confidence_threshold: float = declare(
        Constant(
            help="Mean entropy below which a canvas counts as certain.",
            unit="nats",
            key="confidence_threshold",
        )
    )
    stability_threshold: int = declare(
        Constant(
            help="Steps for which the argmax must be stable; at most the served number.",
            unit="steps",
            integral=True,
            most=MAX_STEPS,
            key="stability_threshold",
        )
    )
    hold_threshold: float = declare(
        Constant(
            help="Probability from which a position keeps an argmax stable for one step; 0: never.",
        ),
        default=0.0,
    )
    doubt_threshold: float = declare(
        Constant(
            help="Expected wrong tokens below which a canvas may end at once; 0: never.",
            unit="tokens",
        ),
        default=0.0,
    )
    soft_embedding_top_k: int = declare(
        Constant(
            help="Most likely ids that self-conditioning averages, an approximation; 0: all ids.",
            unit="ids",
            integral=True,
            least=8,  # fewer are too coarse an approximation
            most=64,  # more cost as much as they save
            off="all ids",
        ),
        default=0,
    )

    @property
    def remembered(self) -> int:
        """As many steps as the argmax has to be stable for."""
        return self.stability_threshold

    def incoherent(self, *, beside: RuleConstants | None = None, prefix: str = "") -> list[str]:
        """``t_max`` must not be below ``t_min``."""
        if self.t_max >= self.t_min:
            return []
        low, high = f"{prefix}t_min ({self.t_min})", f"{prefix}t_max ({self.t_max})"
        served = ""
        if isinstance(beside, EntropyBoundConstants):
            served = f"; served are {beside.t_min} to {beside.t_max}"
        return [f"{high} must not be below {low}{served}"]


REVEAL_BY: Final = ("drawn", "model", "entropy", "margin", "random", "leftmost")
"""What makes a position sure, see ``denoise.score``."""

PROBABILITIES: Final = ("drawn", "model", "margin")
"""Those of them that lie between 0 and 1, which a threshold is about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevealConstants(RuleConstants):
    """Constants of ``rules.reveal``: the published rule of families with a mask token."""

    kind: ClassVar[str] = "reveal"

    reveal_threshold: float = declare(
        Constant(
            help="Confidence above which every open position is revealed; 0: the schedule alone.",
        )
    )
    reveal_by: str = declare(
        Constant(
            help="Confidence of a position: probability of its token as drawn or as the model "
            "gives it, low entropy, margin, none (random), or its place.",
            choices=REVEAL_BY,
        )
    )

    def incoherent(self, *, beside: RuleConstants | None = None, prefix: str = "") -> list[str]:
        """A threshold needs a confidence that is a probability, or a difference of two."""
        if self.reveal_threshold == 0 or self.reveal_by in PROBABILITIES:
            return []
        served = ""
        if isinstance(beside, RevealConstants):
            served = f"; served are {beside.reveal_threshold:g} and {beside.reveal_by}"
        threshold = f"{prefix}reveal_threshold ({self.reveal_threshold:g})"
        needs = f"{prefix}reveal_by to be one of {', '.join(PROBABILITIES)}"
        return [f"{threshold} needs {needs}, got {self.reveal_by}{served}"]


KINDS: Final[Mapping[str, type[RuleConstants]]] = {
    constants.kind: constants for constants in (EntropyBoundConstants, RevealConstants)
}
"""Every kind of rule by its name."""


def declared(kind: type[RuleConstants]) -> dict[str, Constant]:
    """The constants of a kind of rule by name, in the order of its record."""
    return {each.name: each.metadata[Constant.__name__] for each in fields(kind)}


def required(kind: type[RuleConstants]) -> tuple[str, ...]:
    """Names of the constants that a checkpoint, or else its family, must give."""
    return tuple(each.name for each in fields(kind) if each.default is MISSING)


def formatted(rule: RuleConstants) -> dict[str, str]:
    """The constants of a rule for display, each as ``name=value``, by name."""
    return {name: f"{name}={getattr(rule, name)}" for name in declared(type(rule))}


CONSTANTS: Final[Mapping[str, Constant]] = {
    name: constant for kind in KINDS.values() for name, constant in declared(kind).items()
}
"""Every constant that a request may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRules:
    """The decoding rules that an engine's requests may use (host side)."""

    default: RuleConstants  # for requests that name no preset
    presets: dict[str, RuleConstants]  # by name of the preset

    @property
    def remembered(self) -> int:
        """Number of previous steps that the pool must store to serve every rule."""
        return max(rule.remembered for rule in (self.default, *self.presets.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that can be written as JSON."""
        return {"kind": self.default.kind, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ServedRules:
        """Read what ``to_dict`` wrote."""
        kind = KINDS[values["kind"]]
        presets = {name: kind(**rule) for name, rule in values["presets"].items()}
        return ServedRules(default=kind(**values["default"]), presets=presets)
