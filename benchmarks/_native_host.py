"""Ways to start native vLLM's DiffusionGemma on a CPU host, where it needs Triton kernels.

Called before vLLM is imported, in a process with VLLM_DIFFUSION=0 and VLLM_USE_V2_MODEL_RUNNER=1.
"""

from __future__ import annotations

from types import SimpleNamespace


def has_gpu() -> bool:
    """Whether vLLM runs on a GPU of this host; then native needs nothing of this file."""
    import torch

    return torch.cuda.is_available()


def pretend_triton_has_a_cpu_backend() -> None:
    """Let vLLM believe Triton can run on the CPU; TRITON_INTERPRET=1 then runs the kernels.

    Only while vLLM looks: torch's compiler would try to use such a backend.
    """
    import triton.backends

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)
    import vllm.triton_utils

    assert vllm.triton_utils.HAS_TRITON
    del triton.backends.backends["cpu"]


def use_stand_ins() -> None:
    """Only the patches that let native vLLM run without Triton; its model and sampler stay."""
    from vllm_diffusion.patches.table import PATCHES
    from vllm_diffusion.upstream import ledger

    ledger.apply(patch for patch in PATCHES if patch.name.startswith("cpu-"))
