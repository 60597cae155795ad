"""``tile.absorb`` in CUDA for GPUs: a block of threads a row, the tile in registers.

Triton's form, ``fused``, is what GPUs run; ``VLLM_DIFFUSION_HEAD=cuda`` asks for this one, while
the package is installed, which builds it, and while it serves. The library is loaded by pointer, as
``native`` is, and has CUDA's runtime in it: one build fits every torch. See ``csrc/head``.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.errors import ConfigError
from vllm_diffusion.head.native import RunningPointers, TilePointers, pointers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from vllm_diffusion.head.tile import RunningStats

VARIABLE: Final = "VLLM_DIFFUSION_HEAD"


def asked_for(environment: Mapping[str, str]) -> bool:
    """Whether ``VLLM_DIFFUSION_HEAD`` asks for this form on GPUs; unset, Triton's runs.

    Raises:
        ConfigError: it asks for something else.
    """
    match environment.get(VARIABLE, "").strip():
        case "" | "triton":
            return False
        case "cuda":
            return True
        case other:
            raise ConfigError(f"{VARIABLE}={other} is no form of the head: expected triton or cuda")


def chosen() -> bool:
    """Whether this form runs on this process's GPUs.

    Raises:
        ConfigError: it is asked for and cannot run.
    """
    if not asked_for(os.environ):
        return False
    library()
    return True


def absorb(
    running: RunningStats,
    logits: Tensor,
    *,
    first: int,
    softcap: float | None,
    temperature: Tensor,
    uniforms: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """See ``tile.absorb``; the weights take the place and the dtype of the logits.

    Args:
        running, first, softcap, temperature, uniforms: as there, on a GPU.
        logits: [R, n] fp32, bf16 or fp16.

    Returns:
        As there, once torch's current stream has come that far.
    """
    temperature, shrink = temperature.contiguous(), torch.empty_like(running.top)
    tile, state = pointers(
        running,
        logits,
        first=first,
        softcap=softcap,
        temperature=temperature,
        uniforms=uniforms,
        shrink=shrink,
    )
    with torch.cuda.device(logits.get_device()):
        status = library().vd_absorb_cuda(
            ctypes.byref(tile), ctypes.byref(state), _stream(logits.device)
        )
    assert status == 0, f"{tuple(logits.shape)} {logits.dtype} logits, CUDA's error {status}"
    return logits, shrink


@cache
def library() -> ctypes.CDLL:
    """The library that came with the package, loaded once.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    return load(Path(__file__).parent)


def load(folder: Path) -> ctypes.CDLL:
    """The library built into a folder.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    mend = (
        f"install vllm-diffusion again with {VARIABLE}=cuda set and nvcc on the PATH or in "
        f"CUDA_HOME, or unset {VARIABLE}: Triton's form then runs."
    )
    built = sorted(folder.glob("_row_pass_cuda.*so"))
    if not built:
        raise ConfigError(f"{VARIABLE}=cuda, but the head's CUDA form is not built: {mend}")
    try:
        compiled = ctypes.CDLL(str(built[0]))
    except OSError as error:
        raise ConfigError(f"the head's CUDA form cannot be loaded ({error}): {mend}") from error
    compiled.vd_absorb_cuda.argtypes = (
        ctypes.POINTER(TilePointers),
        ctypes.POINTER(RunningPointers),
        ctypes.c_void_p,
    )
    return compiled


def _stream(device: torch.device) -> int:
    """Torch's current stream on that GPU, as CUDA knows it."""
    return int(torch.cuda.current_stream(device).cuda_stream)
