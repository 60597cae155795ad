"""``tile.absorb`` in C++ for CPU hosts: one pass over a row while it is in the cache.

The library is built with the package where there is a C++ compiler, see ``compiled`` and
``csrc/head``. AVX-512, AVX2 or plain code is chosen at run time.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.compiled import load
from vllm_diffusion.head import sample

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.tile import RunningStats

logger = logging.getLogger(f"vllm.{__name__}")

_POINTERS = ("top", "second", "mass", "moment", "score", "argmax", "sample")
ISAS: Final = ("plain", "AVX2", "AVX-512")
"""Instruction sets of the library, by the number it gives them."""

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of logits, by the number that row_pass.h gives them."""

CPU_DTYPES: Final = frozenset({torch.float32, torch.bfloat16})
"""Those that the C++ form takes."""

_TILE: Final = 4096  # VD_TILE and VD_BIN of row_pass.h
_BIN: Final = 64


class RunningPointers(ctypes.Structure):
    """``vd_running``."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _POINTERS)


class TilePointers(ctypes.Structure):
    """``vd_tile``."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("softcap", ctypes.c_float),
        ("temperature", ctypes.c_void_p),
        ("gumbel", ctypes.c_void_p),
        ("inside", ctypes.c_void_p),
        ("uniform_stride", ctypes.c_int64),
        ("shrink", ctypes.c_void_p),
    )


def fits(logits: Tensor) -> bool:
    """Whether the library takes these logits [R, n] in: else ``tile.absorb`` does."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in CPU_DTYPES
        and sample.bin_size() == _BIN
        and sample.TILE == _TILE
        and logits.stride(1) == 1
        and library() is not None
    )


def absorb(
    running: RunningStats,
    logits: Tensor,
    *,
    first: int,
    softcap: float | None,
    temperature: Tensor,
    uniforms: tuple[Tensor, Tensor],
    isa: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``tile.absorb``; the weights take the place and the dtype of the logits.

    Args:
        running, first, softcap, temperature, uniforms: as there.
        logits: [R, n] fp32 or bf16.
        isa: a place in ``ISAS``; None for the best this processor has.
    """
    compiled = library()
    assert compiled is not None
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
    chosen = compiled.vd_best_isa() if isa is None else isa
    status = compiled.vd_absorb(
        ctypes.byref(tile), ctypes.byref(state), torch.get_num_threads(), chosen
    )
    assert status == 0, f"{tuple(logits.shape)} logits, instruction set {chosen}"
    return logits, shrink


def pointers(
    running: RunningStats,
    logits: Tensor,
    *,
    first: int,
    softcap: float | None,
    temperature: Tensor,
    uniforms: tuple[Tensor, Tensor],
    shrink: Tensor,
) -> tuple[TilePointers, RunningPointers]:
    """What row_pass.h calls a tile and what is running, good as long as the tensors live.

    Args:
        running, first, softcap, uniforms: see ``tile.absorb``.
        logits: [R, n], of a dtype in ``DTYPES``, its columns side by side.
        temperature: [R] fp32, contiguous.
        shrink: [R] fp32, written to.
    """
    gumbel, inside = uniforms
    assert gumbel.stride() == inside.stride()
    assert temperature.is_contiguous()
    assert logits.stride(1) == 1
    tile = TilePointers(
        values=logits.data_ptr(),
        rows=logits.shape[0],
        width=logits.shape[1],
        stride=logits.stride(0),
        first=first,
        dtype=DTYPES[logits.dtype],
        softcap=softcap or 0.0,
        temperature=temperature.data_ptr(),
        gumbel=gumbel.data_ptr(),
        inside=inside.data_ptr(),
        uniform_stride=gumbel.stride(0),
        shrink=shrink.data_ptr(),
    )
    state = RunningPointers(
        top=running.top.data_ptr(),
        second=running.second.data_ptr(),
        mass=running.mass.data_ptr(),
        moment=running.moment.data_ptr(),
        score=running.score.data_ptr(),
        argmax=running.argmax.data_ptr(),
        sample=running.sample.data_ptr(),
    )
    return tile, state


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, loaded once; None, with one line in the log, where there is none."""
    compiled = load(Path(__file__).parent, "_row_pass", part="the head", logger=logger)
    if compiled is None:
        return None
    compiled.vd_absorb.argtypes = (
        ctypes.POINTER(TilePointers),
        ctypes.POINTER(RunningPointers),
        ctypes.c_int32,
        ctypes.c_int32,
    )
    return compiled
