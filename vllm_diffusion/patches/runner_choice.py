"""A diffusion model reaches Model Runner V2 on a CPU host that has no Triton backend.

vLLM refuses Model Runner V2 where there is no usable Triton, because its per-step bookkeeping is
written as Triton kernels, and it refuses diffusion models on Model Runner V1. On a CPU host with
the Triton everybody gets from PyPI (no CPU backend), the two refusals meet and a diffusion model
cannot start. We carry stand-ins for those kernels (`cpu_kernels.py`), so the first refusal is
lifted here, for diffusion models only: every other model served by the same process keeps vLLM's
own choice of runner, worker and kernels.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from typing import TYPE_CHECKING, Any

from vllm_diffusion.errors import UnsupportedRunnerError
from vllm_diffusion.upstream.runner import RUNNER_VARIABLE, is_diffusion, runner_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def allow_choice(use_v2_model_runner: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Let `VllmConfig.use_v2_model_runner` choose V2 for a diffusion model without Triton."""

    def allowed(self: Any) -> bool:
        with _triton_taken_as_given(is_diffusion(self)):
            return use_v2_model_runner(self)

    return allowed


def allow_validation(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let `VllmConfig._validate_v2_model_runner` pass a diffusion model without Triton.

    Whatever else it refuses, it still refuses.
    """

    def allowed(self: Any) -> None:
        with _triton_taken_as_given(is_diffusion(self)):
            validate(self)

    return allowed


def explain_refusal(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    """Make `VllmConfig._validate_v1_model_runner` say why a diffusion model ended up on V1.

    For a diffusion model it raises `UnsupportedRunnerError` in place of vLLM's own `ValueError`.
    """

    def explained(self: Any) -> None:
        if is_diffusion(self):
            raise UnsupportedRunnerError(
                runner_refusal(
                    os.environ.get(RUNNER_VARIABLE),
                    self._get_v2_model_runner_unsupported_features(),
                )
            )
        validate(self)

    return explained


@contextlib.contextmanager
def _triton_taken_as_given(condition: bool) -> Iterator[None]:
    """While inside, and only if `condition`, `vllm.config.vllm` believes that Triton is usable.

    Both callers run vLLM's own decision under this belief, so everything else that V2 may refuse
    is still decided by vLLM. A configuration is built by one thread.
    """
    import vllm.config.vllm as config_module

    believed = config_module.HAS_TRITON
    config_module.HAS_TRITON = believed or condition
    try:
        yield
    finally:
        config_module.HAS_TRITON = believed


def choice_asks_for_triton() -> bool:
    """Whether vLLM's choice of a runner still asks for Triton."""
    return "HAS_TRITON" in _source("use_v2_model_runner")


def validation_asks_for_triton() -> bool:
    """Whether vLLM's check of Model Runner V2 still asks for Triton."""
    return "HAS_TRITON" in _source("_validate_v2_model_runner")


def refusal_is_unexplained() -> bool:
    """Whether vLLM's refusal of Model Runner V1 still does not name the variable."""
    return RUNNER_VARIABLE not in _source("_validate_v1_model_runner")


def _source(name: str) -> str:
    from vllm.config.vllm import VllmConfig

    member = inspect.getattr_static(VllmConfig, name)
    function: Any = member.fget if isinstance(member, property) else member
    return inspect.getsource(inspect.unwrap(function))
