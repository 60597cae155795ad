"""A matrix in NVFP4 or FP8, and the numbers it stands for.

    NVFP4   w[n, k] = E2M1(code) * (E4M3(group_scale[n, k // 16]) * row_scale[n])
    FP8     w[n, k] = E4M3(code) * row_scale[n]

Both are the layouts of compressed-tensors (nvfp4-pack-quantized, float-quantized by channel), whose
one scale of a whole NVFP4 tensor is repeated for every row here, because rows of several tensors
are one matrix in an engine. A CPU multiplies with activations as they are: the schemes' own
rounding of activations (W4A4, W8A8) serves tensor cores and would only add error here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

GROUP: Final = 16
"""Inputs that share a scale in NVFP4."""

E2M1: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of the lower three bits of a code; the fourth is the sign."""

_NAN: Final = 0x7F


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedMatrix:
    """One matrix [N, K], or a stack of them [E, N, K]; `E` leads every shape then."""

    codes: Tensor
    """[N, K/2] uint8 in NVFP4, the earlier input in the low four bits; [N, K] uint8 in FP8."""
    group_scale: Tensor | None
    """[N, K/16] uint8, the bits of an E4M3 number; None in FP8."""
    row_scale: Tensor
    """[N] fp32."""

    @property
    def tensors(self) -> list[Tensor]:
        """Its tensors, what `of` makes the same matrix of."""
        middle = [] if self.group_scale is None else [self.group_scale]
        return [self.codes, *middle, self.row_scale]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> PackedMatrix:
        """The matrix that has these `tensors`."""
        codes, *middle, row_scale = tensors
        return cls(codes=codes, group_scale=middle[0] if middle else None, row_scale=row_scale)

    @property
    def inputs(self) -> int:
        """K."""
        return int(self.codes.shape[-1]) * (1 if self.group_scale is None else 2)

    @property
    def rows(self) -> int:
        """N."""
        return int(self.codes.shape[-2])

    @property
    def elements(self) -> int:
        """How many weights there are, of all matrices of a stack."""
        return self.codes.numel() * (1 if self.group_scale is None else 2)

    @property
    def nbytes(self) -> int:
        """Bytes that the codes and scales take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def __getitem__(self, number: int) -> PackedMatrix:
        """One matrix of a stack, sharing its memory."""
        return PackedMatrix.of([tensor[number] for tensor in self.tensors])

    def has_nan(self) -> bool:
        """Whether a code or a scale is none of the numbers the formats have."""
        bytes_of_e4m3 = self.codes if self.group_scale is None else self.group_scale
        return bool(
            (bytes_of_e4m3 & _NAN == _NAN).any() or not torch.isfinite(self.row_scale).all()
        )


def dequantise(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """[.., N, K] in `dtype`: the definition. Every product is rounded to fp32, then to `dtype`."""
    scale = matrix.row_scale[..., None]
    if matrix.group_scale is None:
        return (matrix.codes.view(torch.float8_e4m3fn).float() * scale).to(dtype)
    code = torch.stack((matrix.codes & 15, matrix.codes >> 4), -1).flatten(-2)
    values = torch.tensor((*E2M1, *(-value for value in E2M1)))[code.int()]
    groups = matrix.group_scale.view(torch.float8_e4m3fn).float() * scale
    return (values.view(*groups.shape, GROUP) * groups[..., None]).flatten(-2).to(dtype)
