"""A diffusion model reaches Model Runner V2 on a CPU host that has no Triton backend.

vLLM refuses Model Runner V2 where there is no usable Triton, because its per-step bookkeeping is
written as Triton kernels, and it refuses diffusion models on Model Runner V1. On a CPU host with
the Triton everybody gets from PyPI (no CPU backend), the two refusals meet and a diffusion model
cannot start. We carry stand-ins for those kernels (`cpu_kernels.py`), so the first refusal is
lifted here, for diffusion models only: every other model served by the same process keeps vLLM's
own choice of runner, worker and kernels.

The worker is chosen through `parallel_config.worker_cls`, vLLM's own option. It travels inside
the configuration to every worker process, which is where the kernels have to be replaced, and only
there: importing Model Runner V2 in a front end would load modules that the CPU worker must get to
adapt first.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import UnsupportedRunnerError

if TYPE_CHECKING:
    from collections.abc import Iterator

STOCK_WORKER: Final = "vllm.v1.worker.cpu_worker.CPUWorker"
TRITON_FREE_WORKER: Final = "vllm_diffusion.patches.cpu_worker.TritonFreeCPUWorker"
RUNNER_VARIABLE: Final = "VLLM_USE_V2_MODEL_RUNNER"


def is_triton_free_cpu() -> bool:
    """Whether vLLM runs on its CPU platform and found no Triton backend it can use."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.triton_utils import HAS_TRITON

    return not HAS_TRITON


def is_diffusion(vllm_config: Any) -> bool:
    """Whether this `VllmConfig` serves a model that vLLM itself calls a diffusion model."""
    model_config = vllm_config.model_config
    return model_config is not None and model_config.is_diffusion


def allow_runner_choice() -> None:
    """Let `VllmConfig.use_v2_model_runner` choose V2 for a diffusion model without Triton."""
    from vllm.config.vllm import VllmConfig

    original = VllmConfig.use_v2_model_runner.fget

    @functools.wraps(original)
    def use_v2_model_runner(self: Any) -> bool:
        with _triton_taken_as_given(is_diffusion(self)):
            return original(self)

    VllmConfig.use_v2_model_runner = property(use_v2_model_runner)


def allow_runner_validation() -> None:
    """Let `VllmConfig._validate_v2_model_runner` pass a diffusion model without Triton.

    Whatever else it refuses, it still refuses.
    """
    from vllm.config.vllm import VllmConfig

    original = VllmConfig._validate_v2_model_runner

    @functools.wraps(original)
    def _validate_v2_model_runner(self: Any) -> None:
        with _triton_taken_as_given(is_diffusion(self)):
            original(self)

    VllmConfig._validate_v2_model_runner = _validate_v2_model_runner


def explain_runner_refusal() -> None:
    """Make `VllmConfig._validate_v1_model_runner` say why a diffusion model ended up on V1.

    For a diffusion model it raises `UnsupportedRunnerError` in place of vLLM's own `ValueError`.
    """
    from vllm.config.vllm import VllmConfig

    original = VllmConfig._validate_v1_model_runner

    @functools.wraps(original)
    def _validate_v1_model_runner(self: Any) -> None:
        if is_diffusion(self):
            raise UnsupportedRunnerError(
                runner_refusal(
                    os.environ.get(RUNNER_VARIABLE),
                    self._get_v2_model_runner_unsupported_features(),
                )
            )
        original(self)

    VllmConfig._validate_v1_model_runner = _validate_v1_model_runner


def runner_refusal(variable: str | None, unsupported: list[str]) -> str:
    """Say why a diffusion model cannot start on Model Runner V1, and the way out.

    `variable` is the value of `VLLM_USE_V2_MODEL_RUNNER`, `unsupported` what V2 said it lacks.
    """
    rule = "a diffusion model runs on vLLM's Model Runner V2 only"
    if variable is not None:
        return f"{rule}, and {RUNNER_VARIABLE}={variable} forces V1: unset {RUNNER_VARIABLE}."
    if unsupported:
        return f"{rule}, and V2 does not support: {', '.join(unsupported)}; turn that off."
    return f"{rule}, and vLLM chose V1: install a Triton backend for this host."


def choose_worker() -> None:
    """Let `CpuPlatform.check_and_update_config` give diffusion models the Triton-free worker.

    A worker class named by the user stays, with a warning: it will meet kernels nobody replaced,
    unless it derives from ours.
    """
    from vllm.logger import init_logger
    from vllm.platforms.cpu import CpuPlatform

    logger = init_logger(__name__)
    original = CpuPlatform.check_and_update_config.__func__

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        if not is_diffusion(vllm_config):
            return
        parallel = vllm_config.parallel_config
        if parallel.worker_cls == STOCK_WORKER:
            parallel.worker_cls = TRITON_FREE_WORKER
        elif parallel.worker_cls != TRITON_FREE_WORKER:
            logger.warning_once(
                "worker_cls=%s is kept for a diffusion model on a CPU host without Triton; "
                "it must derive from %s, or the first step fails.",
                parallel.worker_cls,
                TRITON_FREE_WORKER,
            )

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


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
