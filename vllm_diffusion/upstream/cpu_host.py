"""What this host can serve: whether it is a CPU without Triton, and whether it applies adapters."""

from __future__ import annotations


def is_triton_free_cpu() -> bool:
    """Whether vLLM runs on its CPU platform and found no Triton backend it can use."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.triton_utils import HAS_TRITON

    return not HAS_TRITON


def adapters_are_served() -> bool:
    """Whether this host can apply adapters: a GPU of vLLM's Triton kernels, or a CPU by ours."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda_alike() or is_triton_free_cpu()
