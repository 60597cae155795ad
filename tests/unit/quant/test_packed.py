"""What packed matrices stand for, in the definition and in every form of the C++ part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from helpers.cases import for_each
from helpers.packed import random_packed

from vllm_diffusion.quant import native
from vllm_diffusion.quant.packed import E2M1, PackedMatrix, dequantise

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("nvfp4", "fp8")

needs_library = pytest.mark.skipif(native.library() is None, reason="the C++ part is not built")


def test_codes_of_nvfp4_are_those_of_compressed_tensors():
    values = torch.tensor([[*E2M1, *(-value for value in E2M1)]])
    matrix = PackedMatrix(
        codes=pack_fp4_to_uint8(values),
        group_scale=torch.ones(1, 1).to(torch.float8_e4m3fn).view(torch.uint8),
        row_scale=torch.ones(1),
    )
    assert torch.equal(dequantise(matrix, torch.float32), values)


def test_every_number_of_fp8():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    matrix = PackedMatrix(codes=codes, group_scale=None, row_scale=torch.full((1,), 2.0))
    expected = codes.view(torch.float8_e4m3fn).double() * 2
    assert torch.equal(
        dequantise(matrix, torch.float32).double().nan_to_num(), expected.nan_to_num()
    )


@pytest.mark.parametrize("form", FORMS)
@for_each(inputs=[16, 48, 2816])
def test_a_weight_is_its_code_times_its_scales(form: str, inputs: int):
    matrix = random_packed(5, inputs, form=form)
    truth = exactly(matrix)
    error = (dequantise(matrix, torch.float32).double() - truth).abs()
    # Two products rounded to fp32.
    assert (error <= 2 * torch.finfo(torch.float32).eps * truth.abs()).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_stack_holds_its_matrices(form: str):
    stack = random_packed(4, 32, form=form, experts=3)
    whole = dequantise(stack, torch.float32)
    assert whole.shape == (3, 4, 32)
    for number in range(3):
        assert torch.equal(dequantise(stack[number], torch.float32), whole[number])


@pytest.mark.parametrize(("form", "most"), [("nvfp4", 0.29), ("fp8", 0.51)])
def test_what_it_saves(form: str, most: float):
    matrix = random_packed(64, 2816, form=form)
    assert matrix.elements == 64 * 2816
    assert matrix.nbytes <= most * 2 * matrix.elements


@pytest.mark.parametrize("where", ["codes", "group_scale", "row_scale"])
def test_nan_is_noticed(where: str):
    matrix = random_packed(4, 32, form="fp8" if where == "codes" else "nvfp4")
    assert not matrix.has_nan()
    tensor: Tensor = getattr(matrix, where)
    tensor[1] = torch.inf if where == "row_scale" else 0xFF
    assert matrix.has_nan()


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest) -> int:
    """The number of an instruction set that this processor has."""
    compiled = native.library()
    assert compiled is not None
    number = native.ISAS.index(request.param)
    if number > compiled.vd_best_isa():
        pytest.skip(f"this processor has no {request.param}")
    return number


@needs_library
@for_each(form=FORMS, dtype=[torch.float32, torch.bfloat16], inputs=[16, 48, 2816])
def test_the_compiled_part_gives_the_same_bits(
    form: str, dtype: torch.dtype, isa: int, inputs: int
):
    matrix = random_packed(37, inputs, form=form)
    panel = torch.empty(29, inputs, dtype=dtype)
    native.unpack(native.pointers(matrix), 5, panel, isa=isa)
    assert torch.equal(panel, dequantise(matrix, dtype)[5:34])


@needs_library
@for_each(inputs=[1, 7, 33])
def test_odd_widths_of_fp8(isa: int, inputs: int):
    matrix = random_packed(3, inputs, form="fp8")
    panel = torch.empty(3, inputs)
    native.unpack(native.pointers(matrix), 0, panel, isa=isa)
    assert torch.equal(panel, dequantise(matrix, torch.float32))


@needs_library
def test_the_compiled_part_knows_every_code(isa: int):
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    fp8 = PackedMatrix(codes=codes[None], group_scale=None, row_scale=torch.ones(1))
    fp4 = PackedMatrix(
        codes=torch.arange(256, dtype=torch.uint8).expand(254, 256).contiguous(),
        group_scale=codes[:, None].expand(254, 32).contiguous(),
        row_scale=torch.ones(254),
    )
    for matrix in (fp8, fp4):
        panel = torch.empty(matrix.rows, matrix.inputs)
        native.unpack(native.pointers(matrix), 0, panel, isa=isa)
        assert torch.equal(panel, dequantise(matrix, torch.float32))


def exactly(matrix: PackedMatrix) -> Tensor:
    """The numbers in fp64, written apart from the definition."""
    if matrix.group_scale is None:
        return matrix.codes.view(torch.float8_e4m3fn).double() * matrix.row_scale.double()[:, None]
    rows = []
    for codes, scales, row in zip(
        matrix.codes.tolist(),
        matrix.group_scale.view(torch.float8_e4m3fn).double().tolist(),
        matrix.row_scale.double().tolist(),
        strict=True,
    ):
        nibbles = [nibble for code in codes for nibble in (code % 16, code // 16)]
        rows.append(
            [
                E2M1[nibble % 8] * (-1) ** (nibble // 8) * scales[at // 16] * row
                for at, nibble in enumerate(nibbles)
            ]
        )
    return torch.tensor(rows, dtype=torch.float64)
