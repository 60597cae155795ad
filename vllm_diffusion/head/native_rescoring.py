"""``rescoring`` in C++ for CPU hosts: a row is searched and mended while it is in the cache."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.head.native import DTYPES, library

if TYPE_CHECKING:
    from torch import Tensor

MOST: Final = 64  # VD_RESCORED of rescore.h


class RescoringPointers(ctypes.Structure):
    """``vd_rescoring``."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("ranked", ctypes.c_void_p),
        ("ranked_stride", ctypes.c_int64),
        ("best", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("output", ctypes.c_void_p),
        ("output_stride", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("softcap", ctypes.c_float),
    )


def rescore(
    logits: Tensor,
    ranked: Tensor,
    best: Tensor,
    hidden: Tensor,
    output: Tensor,
    *,
    softcap: float | None,
    isa: int | None = None,
) -> None:
    """Give the best ids of a tile their exact logits.

    Args:
        logits: [R, n] fp32; changed.
        ranked: [R, n] fp32, by which the best are the best.
        best: [R, count] fp32 of the tiles before, dense, at most ``MOST`` a row; changed.
        hidden: [R, H] fp32 or bf16.
        output: [n, H] of the same dtype, the tile's part of the matrix.
        softcap: of the exact logits; None for none.
        isa: a place in ``native.ISAS``; None for the best this processor has.
    """
    compiled = library()
    assert compiled is not None
    assert hidden.dtype == output.dtype
    assert best.is_contiguous()
    assert {logits.stride(1), ranked.stride(1), hidden.stride(1), output.stride(1)} == {1}
    tile = RescoringPointers(
        values=logits.data_ptr(),
        rows=logits.shape[0],
        width=logits.shape[1],
        stride=logits.stride(0),
        ranked=ranked.data_ptr(),
        ranked_stride=ranked.stride(0),
        best=best.data_ptr(),
        count=best.shape[1],
        hidden=hidden.data_ptr(),
        hidden_stride=hidden.stride(0),
        output=output.data_ptr(),
        output_stride=output.stride(0),
        inputs=hidden.shape[1],
        dtype=DTYPES[hidden.dtype],
        softcap=softcap or 0.0,
    )
    chosen = compiled.vd_best_isa() if isa is None else isa
    status = compiled.vd_rescore(
        ctypes.byref(tile), ctypes.c_int32(torch.get_num_threads()), ctypes.c_int32(chosen)
    )
    assert status == 0, f"{tuple(logits.shape)} logits, instruction set {chosen}"
