"""A plain matrix in fewer bits: every number becomes the nearest that its scale allows."""

from __future__ import annotations

import torch
from helpers.cases import for_each

from vllm_diffusion.quant import int8, rounding
from vllm_diffusion.quant.int8 import Int8Rows
from vllm_diffusion.quant.packed import E2M1, GROUP, PackedMatrix, dequantise
from vllm_diffusion.quant.rounding import to_fp8, to_nvfp4


def weights(rows: int = 40, inputs: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    matrix = torch.randn(rows, inputs, generator=generator)
    matrix *= torch.logspace(-3, 2, rows)[:, None]
    matrix[1], matrix[2, GROUP:] = 0, 0
    return matrix


def test_fp8_is_the_nearest_number_of_its_row():
    matrix = weights()
    packed = to_fp8(matrix)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = every[torch.isfinite(every)]
    grid = numbers * packed.row_scale[:, None, None]
    nearest = (matrix[..., None] - grid).abs().amin(dim=-1)
    error = (matrix - dequantise(packed, torch.float32)).abs()
    assert torch.allclose(error, nearest, rtol=1e-4, atol=1e-30)
    largest = dequantise(packed, torch.float32).abs().amax(dim=1)
    assert torch.allclose(largest, matrix.abs().amax(dim=1), rtol=1e-6)


def test_nvfp4_is_the_nearest_number_of_its_group():
    matrix = weights()
    packed = to_nvfp4(matrix)
    assert packed.group_scale is not None
    scale = packed.group_scale.view(torch.float8_e4m3fn).float() * packed.row_scale[:, None]
    grid = torch.tensor((*E2M1, *(-value for value in E2M1))) * scale[..., None, None]
    nearest = (matrix.unflatten(1, (-1, GROUP))[..., None] - grid).abs().amin(dim=-1)
    error = (matrix - dequantise(packed, torch.float32)).abs()
    assert torch.allclose(error, nearest.flatten(1), rtol=1e-4, atol=1e-30)
    # A group's scale is its largest weight's, within E4M3's own rounding.
    wanted = matrix.unflatten(1, (-1, GROUP)).abs().amax(dim=-1) / E2M1[-1]
    spoken = wanted > wanted.amax(dim=1, keepdim=True) / 1000
    assert (scale / wanted)[spoken].sub(1).abs().max() < 2**-4


@for_each(rounded=[to_fp8, to_nvfp4, Int8Rows.of])
def test_blocks_do_not_show(rounded, monkeypatch):
    matrix = weights()
    whole = tensors(rounded(matrix))
    monkeypatch.setattr(rounding, "_BLOCK", 7)
    monkeypatch.setattr(int8, "_BLOCK", 7)
    for one, other in zip(whole, tensors(rounded(matrix)), strict=True):
        assert torch.equal(one, other)


@for_each(rounded=[to_fp8, to_nvfp4])
def test_a_row_of_zeros_stays_zero(rounded):
    assert not dequantise(rounded(torch.zeros(3, 32)), torch.float32).any()


def test_int8_rounds_both_sides_and_nothing_else():
    left, right = weights(9), weights(33)
    x, weight = Int8Rows.of(left), Int8Rows.of(right)
    for values, rows in ((left, x), (right, weight)):
        step = rows.scale[:, None]
        assert ((rows.codes * step - values).abs() <= 0.5001 * step).all()
        assert (rows.codes.abs().amax(dim=1) == 127)[values.any(dim=1)].all()
    sums = x.codes.double() @ weight.codes.double().T
    exactly = sums * x.scale.double()[:, None] * weight.scale.double()
    assert torch.allclose(int8.product(x, weight).double(), exactly, rtol=1e-6)
    assert torch.equal(int8.product(x, weight[5:8]), int8.product(x, weight)[:, 5:8])


def test_a_row_of_nan_is_nan():
    broken = torch.full((1, 32), torch.nan)
    assert int8.product(Int8Rows.of(broken), Int8Rows.of(weights(3, 32))).isnan().all()


def tensors(matrix: PackedMatrix | Int8Rows) -> list[torch.Tensor]:
    return [matrix.codes, matrix.scale] if isinstance(matrix, Int8Rows) else matrix.tensors
