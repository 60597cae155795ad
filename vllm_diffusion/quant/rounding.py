"""A plain matrix in fewer bits, row by row and rounded to nearest: what a checkpoint did not do.

FP8     the row's largest weight becomes E4M3's largest number
NVFP4   the largest weight of a group of 16 becomes E2M1's, its scale a number of E4M3 whose
        largest is the row's
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.quant.packed import E2M1, GROUP, PackedMatrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_E4M3_LARGEST: Final = 448.0
_E2M1_LARGEST: Final = E2M1[-1]
_NEGATIVE: Final = 8
_BLOCK: Final = 4096  # rows that are in fp32 at a time
_SMALLEST: Final = torch.finfo(torch.float32).tiny


def to_fp8(weight: Tensor) -> PackedMatrix:
    """[N, K] of any float dtype in FP8, a scale a row."""
    return _in_blocks(weight, _fp8)


def to_nvfp4(weight: Tensor) -> PackedMatrix:
    """[N, K] of any float dtype in NVFP4, K a multiple of 16; every row has a scale of its own."""
    return _in_blocks(weight, _nvfp4)


def _in_blocks(weight: Tensor, rounded: Callable[[Tensor], PackedMatrix]) -> PackedMatrix:
    blocks = [rounded(block.float()) for block in torch.split(weight, _BLOCK)]
    parts = zip(*(block.tensors for block in blocks), strict=True)
    return PackedMatrix.of([torch.cat(part) for part in parts])


def _fp8(weight: Tensor) -> PackedMatrix:
    scale = _largest(weight) / _E4M3_LARGEST
    codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return PackedMatrix(codes=codes.view(torch.uint8), group_scale=None, row_scale=scale)


def _nvfp4(weight: Tensor) -> PackedMatrix:
    groups = weight.view(len(weight), -1, GROUP)
    row_scale = _largest(weight) / (_E2M1_LARGEST * _E4M3_LARGEST)
    wanted = groups.abs().amax(dim=-1) / (_E2M1_LARGEST * row_scale[:, None])
    group_scale = wanted.to(torch.float8_e4m3fn)
    # A group of weights near zero has the scale 0, and whatever codes.
    step = (group_scale.float() * row_scale[:, None]).clamp_(min=_SMALLEST)
    numbers = torch.tensor(E2M1, device=weight.device)
    between = (numbers[1:] + numbers[:-1]) / 2
    magnitude = torch.bucketize(groups.abs() / step[..., None], between)
    codes = torch.where(groups < 0, magnitude + _NEGATIVE, magnitude).flatten(1).to(torch.uint8)
    return PackedMatrix(
        codes=codes[:, ::2] | codes[:, 1::2] << 4,
        group_scale=group_scale.view(torch.uint8),
        row_scale=row_scale,
    )


def _largest(weight: Tensor) -> Tensor:
    """[N] the largest magnitude of every row, above 0."""
    return weight.abs().amax(dim=1).clamp_(min=_SMALLEST * _E4M3_LARGEST * _E2M1_LARGEST)
