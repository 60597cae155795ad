"""The worker class a diffusion model runs in on a CPU host without a Triton backend.

vLLM resolves it by name, in the worker process, from `parallel_config.worker_cls`. Importing
`vllm.v1.worker.cpu_worker` comes first on purpose: its own first import replaces CUDA streams,
pinned memory and device buffers by host versions, and a Model Runner V2 module imported before that
would keep the device ones.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_diffusion.patches.table import PATCHES
from vllm_diffusion.upstream import ledger


class TritonFreeCPUWorker(CPUWorker):
    """vLLM's CPU worker, with stand-ins for the Triton kernels of Model Runner V2."""

    def init_device(self) -> None:
        """Replace the kernels, then build device and model runner as vLLM does."""
        # Here too: the worker also serves native vLLM's class, with the plugin switched off.
        ledger.register(PATCHES)
        ledger.apply_stage(ledger.Stage.WORKER)
        # Warming up would launch every sampler kernel once to compile it: there is nothing to
        # compile, and the kernels a diffusion model never launches have no stand-in.
        self.vllm_config.kernel_config.enable_jit_warmup = False
        super().init_device()
