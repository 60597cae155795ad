"""The decoding rules, each as one object: see ``rule.Rule``, and ``entropy_bound`` for one of them.

A rule puts the pure functions of ``denoise`` together for the canvases of a pool. A family of
models names the rule that it was published with (``family.Family``).
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
"""The same where there is a GPU, as Triton kernels. Elsewhere there may be no Triton."""


def rule_for(kind: str, noise: CanvasNoise, *, device_type: str) -> Rule:
    """The rule of a kind (``RuleConstants.kind``) in the form that suits the device."""
    module, _, name = (_KERNELS if device_type == "cuda" else _RULES)[kind].partition(":")
    rule: Rule = getattr(import_module(module), name)(noise)
    return rule
