"""The constants of decoding rules, each declared once.

A rule's constants are a frozen record, and a constant is one of its fields. The field also says
everything else there is to know: unit, bounds, meaning, and what a generation config calls it.
Options of requests and of the engine, the tensors of the canvas pool, traces, error messages and
the table in docs/options.md are derived from it, so a new constant takes two files: this one and
the rule that reads it.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MAX_STEPS: Final = 1024
"""Most denoising steps a canvas may take. Published rules take 48; a limit keeps slots moving."""

LARGEST: Final = 1e6
"""No temperature and no number of nats is meaningful above this, and fp32 overflows far above."""

SMALLEST: Final = 1 / LARGEST
"""Least number that logits are divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """What is known about a constant beside its value."""

    help: str
    """One line for documentation."""
    unit: str = ""
    """Empty for a plain number."""
    integral: bool = False
    least: float = 0.0
    most: float = LARGEST
    off: str | None = None
    """What 0 means where 0 is accepted although it lies below ``least``."""
    key: str | None = None
    """Dotted name in a generation config; None if no checkpoint gives it."""
    exact: bool = False
    """The pool holds it in fp64."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the pool's tensor."""
        if self.integral:
            return torch.int64
        return torch.float64 if self.exact else torch.float32

    def expected(self, value: object) -> str | None:
        """What a value has to be, if it is something else; None if it is accepted."""
        number = isinstance(value, int if self.integral else int | float)
        if not number or isinstance(value, bool):
            return self._accepted()
        assert isinstance(value, int | float)
        if self.off is not None:
            return None if value == 0 or self.least <= value <= self.most else self._accepted()
        if value > self.most:
            most = f"at most {self.most:g}"
            return most if self.integral else f"a finite number of {most}"
        return None if value >= self.least else self._accepted()  # NaN is not either

    def _accepted(self) -> str:
        if self.off is not None:
            return f"0 for {self.off}, or an integer from {self.least:g} to {self.most:g}"
        if self.integral:
            return "a positive integer" if self.least == 1 else "an integer of at least 0"
        return f"a finite number of at least {self.least:g}"


def declare(constant: Constant, *, default: float | None = None) -> Any:  # noqa: ANN401 - a field
    """A dataclass field for a constant; without a default the checkpoint has to give it."""
    given: Any = MISSING if default is None else default
    return field(default=given, metadata={Constant.__name__: constant})


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConstants:
    """What the constants of every rule have in common (host side).

    Constants without a default belong to the published rule. The default of any other constant
    switches its part of the rule off.
    """

    kind: ClassVar[str]
    """Name of the rule, a key of ``KINDS``."""
    sections: ClassVar[Mapping[str, str]] = {}
    """Sections of a generation config that hold constants, and the class each has to name."""

    max_steps: int = declare(
        Constant(
            help="The most denoising steps a canvas may take; the temperature ramp follows it.",
            unit="steps",
            integral=True,
            least=1,
            most=MAX_STEPS,
            key="max_denoising_steps",
        )
    )

    @property
    def remembered(self) -> int:
        """Steps whose argmax the rule compares with the latest one."""
        return 0

    def incoherent(self, *, beside: RuleConstants | None = None, prefix: str = "") -> list[str]:
        """Why these values cannot be used together, if they cannot.

        Args:
            beside: the served rule, which a request changes.
            prefix: of the constants' names.
        """
        del beside, prefix
        return []


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBoundConstants(RuleConstants):
    """Of ``rules.entropy_bound``: DiffusionGemma's published rule and two additions to it."""

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
            key="t_max",
            exact=True,
        )
    )
    entropy_bound: float = declare(
        Constant(
            help="Entropy that the tokens accepted in one step may share.",
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
            help="Steps for which the argmax must hold; at most the served number.",
            unit="steps",
            integral=True,
            most=MAX_STEPS,
            key="stability_threshold",
        )
    )
    hold_threshold: float = declare(
        Constant(
            help="Probability from which a position keeps an argmax that held for a step; "
            "0: never.",
        ),
        default=0.0,
    )
    doubt_threshold: float = declare(
        Constant(
            help="Expected wrong tokens below which a canvas may end without having held; "
            "0: never.",
            unit="tokens",
        ),
        default=0.0,
    )
    soft_embedding_top_k: int = declare(
        Constant(
            help="Likeliest ids that self-conditioning averages, an approximation; 0: all ids.",
            unit="ids",
            integral=True,
            least=8,  # fewer say little
            most=64,  # more cost what is to be saved
            off="all ids",
        ),
        default=0,
    )

    @property
    def remembered(self) -> int:
        """The argmax is compared with as many steps as it has to hold."""
        return self.stability_threshold

    def incoherent(self, *, beside: RuleConstants | None = None, prefix: str = "") -> list[str]:
        """Why the temperatures make no ramp, if they make none."""
        if self.t_max >= self.t_min:
            return []
        low, high = f"{prefix}t_min ({self.t_min})", f"{prefix}t_max ({self.t_max})"
        served = ""
        if isinstance(beside, EntropyBoundConstants):
            served = f"; served are {beside.t_min} to {beside.t_max}"
        return [f"{high} must not be below {low}{served}"]


KINDS: Final[Mapping[str, type[RuleConstants]]] = {
    constants.kind: constants for constants in (EntropyBoundConstants,)
}
"""Every kind of rule by its name."""


def declared(kind: type[RuleConstants]) -> dict[str, Constant]:
    """The constants of a kind of rule by name, in the order of its record."""
    return {each.name: each.metadata[Constant.__name__] for each in fields(kind)}


def published(kind: type[RuleConstants]) -> tuple[str, ...]:
    """Names of the constants that a checkpoint has to give."""
    return tuple(each.name for each in fields(kind) if each.default is MISSING)


def written(rule: RuleConstants) -> dict[str, str]:
    """The constants of a rule as a reader sees them, each as ``name=value``, by name."""
    return {name: f"{name}={getattr(rule, name)}" for name in declared(type(rule))}


CONSTANTS: Final[Mapping[str, Constant]] = {
    name: constant for kind in KINDS.values() for name, constant in declared(kind).items()
}
"""Every constant that a request may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedRules:
    """The rules that the requests of an engine may be denoised by (host side)."""

    default: RuleConstants  # where a request names no preset
    presets: dict[str, RuleConstants]  # by the preset that a request names

    @property
    def remembered(self) -> int:
        """Steps that the engine must remember so that every one of the rules can be followed."""
        return max(rule.remembered for rule in (self.default, *self.presets.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a config that is written as JSON."""
        return {"kind": self.default.kind, **asdict(self)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ServedRules:
        """Read what ``to_dict`` wrote."""
        kind = KINDS[values["kind"]]
        presets = {name: kind(**rule) for name, rule in values["presets"].items()}
        return ServedRules(default=kind(**values["default"]), presets=presets)


class ConstantTable:
    """The constants of every slot as tensors [S], each under its name."""

    def __init__(self, constants: RuleConstants, *, num_slots: int, device: torch.device) -> None:
        self._tensors: dict[str, Tensor] = {
            name: torch.full(
                (num_slots,), getattr(constants, name), dtype=constant.dtype, device=device
            )
            for name, constant in declared(type(constants)).items()
        }

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise AttributeError(name) from None

    def put(self, slot: int, constants: RuleConstants) -> None:
        """Give a slot its constants; nobody waits for the device."""
        for name, tensor in self._tensors.items():
            tensor[slot].fill_(getattr(constants, name))
