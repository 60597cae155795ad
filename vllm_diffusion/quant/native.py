"""`packed.dequantise` in C++, some rows at a time, into memory that is used again and again.

The library is built, found and called like that of `head.native`: no torch, no Python, one build
for every torch; AVX-512, AVX2 or plain code is chosen at run time.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.compiled import load

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.quant.packed import PackedMatrix

logger = logging.getLogger(f"vllm.{__name__}")

ISAS: Final = ("plain", "AVX2", "AVX-512")
"""Instruction sets of the library, by the number it gives them."""

DTYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
"""What it unpacks to, by the number that unpack.h gives it."""


class PackedPointers(ctypes.Structure):
    """`vd_packed`."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("group_scale", ctypes.c_void_p),
        ("row_scale", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
    )


def pointers(matrix: PackedMatrix) -> PackedPointers:
    """What unpack.h calls a packed matrix, good as long as the tensors live."""
    scale = matrix.group_scale
    assert matrix.codes.is_contiguous()
    assert matrix.row_scale.is_contiguous()
    assert scale is None or scale.is_contiguous()
    return PackedPointers(
        codes=matrix.codes.data_ptr(),
        group_scale=None if scale is None else scale.data_ptr(),
        row_scale=matrix.row_scale.data_ptr(),
        inputs=matrix.inputs,
    )


def unpack(source: PackedPointers, first: int, panel: Tensor, *, isa: int | None = None) -> None:
    """Write rows `first` to `first + P` of a matrix into `panel`.

    Args:
        source: of one matrix [N, K].
        first: row.
        panel: [P, K] of a dtype in `DTYPES`, dense; written to.
        isa: a place in `ISAS`; None for the best this processor has.
    """
    compiled = library()
    assert compiled is not None
    assert panel.is_contiguous()
    chosen = compiled.vd_best_isa() if isa is None else isa
    status = compiled.vd_unpack(
        ctypes.byref(source),
        first,
        panel.shape[0],
        panel.data_ptr(),
        DTYPES[panel.dtype],
        torch.get_num_threads(),
        chosen,
    )
    assert status == 0, f"{source.inputs} inputs to {panel.dtype}, instruction set {chosen}"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, loaded once; None, with one line in the log, where there is none."""
    compiled = load(Path(__file__).parent, "_unpack", part="packed weights", logger=logger)
    if compiled is None:
        return None
    compiled.vd_unpack.argtypes = (
        ctypes.POINTER(PackedPointers),
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_int32,
    )
    return compiled
