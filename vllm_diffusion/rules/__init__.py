"""The decoding rules, one object each: ``rule.Rule`` is the interface, ``entropy_bound`` a rule.

A rule composes the pure functions of ``denoise`` for the canvases of a pool. A model family names
the rule that it was published with (``family.Family``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vllm_diffusion.denoise.noise import CanvasNoise
    from vllm_diffusion.rules.rule import Rule

_RULES: Final = {
    "entropy_bound": "vllm_diffusion.rules.entropy_bound:EntropyBound",
}
_KERNELS: Final = {
    "entropy_bound": "vllm_diffusion.rules.entropy_bound_kernels:EntropyBoundKernels",
}
"""The same as Triton kernels, for GPUs; by name, because other hosts may have no Triton."""


def rule_for(kind: str, noise: CanvasNoise, *, device_type: str) -> Rule:
    """The rule of a kind (``RuleConstants.kind``), implemented for the device."""
    module, _, name = (_KERNELS if device_type == "cuda" else _RULES)[kind].partition(":")
    rule: Rule = getattr(import_module(module), name)(noise)
    return rule
