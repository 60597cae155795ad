"""A copy of the output matrix in fewer bits, for most logits of a row: opt-in, an approximation.

Logits are computed from the copy, tile by tile. The ``RESCORED`` best ids of every row get the
exact logits of the matrix instead, see ``rescoring``. They decide a row's best token and, where the
row is sure of it, nearly all of its entropy. Only the many small logits stay approximate. Soft
embeddings are computed from the matrix itself.

On a GPU ``chunks`` uses fp8 alone, and only for rows whose logits nothing rewrites. All other rows
use the matrix.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, Literal, get_args

import torch

from vllm_diffusion.quant import int8, native
from vllm_diffusion.quant.int8 import Int8Rows
from vllm_diffusion.quant.packed import PackedMatrix, dequantise
from vllm_diffusion.quant.product import linear
from vllm_diffusion.quant.rounding import to_fp8, to_nvfp4

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HeadForm = Literal["int8", "fp8", "nvfp4"]
HEAD_FORMS: Final[tuple[HeadForm, ...]] = get_args(HeadForm)

RESCORED: Final = 16
"""Ids of a row whose logits are exact; benchmarks/output_copy.py compares others."""


class QuantisedOutput:
    """A copy of the output matrix [V, H] in fewer bits; made again when the matrix has changed.

    Args:
        output: [V, H], the matrix.
        form: of the copy.
        rescored: ids of a row whose logits are exact; 0 for none.
        loads: how often the matrix was loaded.
    """

    def __init__(
        self,
        output: Tensor,
        form: HeadForm,
        *,
        rescored: int = RESCORED,
        loads: Callable[[], int] = lambda: 1,
    ) -> None:
        self.form, self.rescored = form, rescored
        self._output, self._loads = output, loads
        self._copy, self._made = _copied(output, form), self._state()

    def _state(self) -> tuple[int, int]:
        # torch counts changes in place, but not those through `.data`, which loaders make.
        return self._loads(), self._output._version  # noqa: SLF001

    @property
    def nbytes(self) -> int:
        """Bytes that the copy takes."""
        return self._copy.nbytes

    def product(self, hidden: Tensor) -> Callable[[slice], Tensor]:
        """What gives [R, n] fp32 logits of some rows of the matrix, of [R, H] states."""
        copy = self._today()
        if isinstance(copy, Int8Rows):
            return partial(_int8_logits, Int8Rows.of(hidden), copy)
        return partial(_packed_logits, hidden, copy)

    def fp8(self) -> tuple[Tensor, Tensor]:
        """The copy in fp8 for products of fp8: codes [V, H] E4M3 and their scales [V] fp32."""
        copy = self._today()
        assert self.form == "fp8"
        assert isinstance(copy, PackedMatrix)
        return copy.codes.view(torch.float8_e4m3fn), copy.row_scale

    def _today(self) -> Int8Rows | PackedMatrix:
        """The copy of the matrix as it is now."""
        if (now := self._state()) != self._made:
            self._copy, self._made = _copied(self._output, self.form), now
        return self._copy


def _copied(output: Tensor, form: HeadForm) -> Int8Rows | PackedMatrix:
    if form == "int8":
        return Int8Rows.of(output)
    return to_fp8(output) if form == "fp8" else to_nvfp4(output)


def _int8_logits(hidden: Int8Rows, copy: Int8Rows, rows: slice) -> Tensor:
    return int8.product(hidden, copy[rows])


def _packed_logits(hidden: Tensor, copy: PackedMatrix, rows: slice) -> Tensor:
    some = PackedMatrix.of([tensor[rows] for tensor in copy.tensors])
    if hidden.dtype in native.DTYPES and native.library() is not None:
        return linear(hidden, some).float()
    return (hidden @ dequantise(some, hidden.dtype).T).float()
