"""A diffusion model gets a worker with CPU kernels on a host that has no Triton backend.

The worker is chosen through `parallel_config.worker_cls`, vLLM's own option. It travels inside
the configuration to every worker process, which is where the kernels have to be replaced, and only
there: importing Model Runner V2 in a front end would load modules that the CPU worker must get to
adapt first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.upstream.runner import is_diffusion

if TYPE_CHECKING:
    from collections.abc import Callable

STOCK_WORKER: Final = "vllm.v1.worker.cpu_worker.CPUWorker"
TRITON_FREE_WORKER: Final = "vllm_diffusion.patches.cpu_worker.TritonFreeCPUWorker"


def choose_worker(check_and_update_config: Callable[..., None]) -> Callable[..., None]:
    """Let `CpuPlatform.check_and_update_config` give diffusion models the Triton-free worker.

    A worker class named by the user stays, with a warning: it will meet kernels nobody replaced,
    unless it derives from ours.
    """
    from vllm.logger import init_logger

    logger = init_logger(f"vllm.{__name__}")

    def with_worker(cls: Any, vllm_config: Any) -> None:
        check_and_update_config(cls, vllm_config)
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

    return with_worker
