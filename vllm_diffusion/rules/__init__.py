"""The decoding rules, one object each: ``rule.Rule`` is the interface.

    entropy_bound   on uniform noise: what is certain enough stays for a step
    reveal          on masks: what is revealed stays for good

A rule composes the pure functions of ``denoise`` for the canvases of a pool. A model family names
the rule that it was published with (``family.Family``).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vllm_diffusion.denoise.noise import CanvasNoise
    from vllm_diffusion.family import Family
    from vllm_diffusion.rules.rule import Rule

_RULES: Final = {
    "entropy_bound": "vllm_diffusion.rules.entropy_bound:EntropyBound",
    "reveal": "vllm_diffusion.rules.reveal:Reveal",
}
_KERNELS: Final = {
    "entropy_bound": "vllm_diffusion.rules.entropy_bound_kernels:EntropyBoundKernels",
    "reveal": "vllm_diffusion.rules.reveal_kernels:RevealKernels",
}
"""The same as Triton kernels, for GPUs; by name, because other hosts may have no Triton."""


def rule_for(family: Family, noise: CanvasNoise, *, device_type: str) -> Rule:
    """The rule that a family names, implemented for the device."""
    module, _, name = (_KERNELS if device_type == "cuda" else _RULES)[family.rule].partition(":")
    kind: type[Rule] = getattr(import_module(module), name)
    return kind.of(family, noise)
