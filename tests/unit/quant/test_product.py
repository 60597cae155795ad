"""Products with packed matrices against fp64: no worse than with the dequantised matrix."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import for_each
from helpers.packed import random_packed

from vllm_diffusion.quant import native
from vllm_diffusion.quant.packed import dequantise
from vllm_diffusion.quant.product import experts, linear

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C++ part is not built")

DTYPES = (torch.float32, torch.bfloat16)
FORMS = ("nvfp4", "fp8")


def root_mean_square(error: torch.Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("form", FORMS)
@for_each(dtype=DTYPES, rows=[1, 5, 64], outputs=[3, 256, 300])
def test_linear(form: str, dtype: torch.dtype, rows: int, outputs: int):
    matrix = random_packed(outputs, 352, form=form)
    x = torch.randn(rows, 352, generator=torch.Generator().manual_seed(1)).to(dtype)
    truth = x.double() @ dequantise(matrix, torch.float64).T
    plain = F.linear(x, dequantise(matrix, dtype))
    # The weights are the same to the bit, so is the kernel; only the order of sums may differ.
    ours, theirs = (root_mean_square(y.double() - truth) for y in (linear(x, matrix), plain))
    assert ours <= 1.1 * theirs
    assert root_mean_square(truth) > 50 * theirs, "an error this large would hide everything"


@for_each(panel=[1, 7, 64, 1000])
def test_panels_do_not_matter(panel: int):
    matrix = random_packed(65, 48, form="nvfp4")
    x = torch.randn(4, 48)
    assert torch.allclose(linear(x, matrix, panel=panel), linear(x, matrix), atol=1e-6)


def test_no_rows():
    assert linear(torch.empty(0, 48), random_packed(65, 48, form="nvfp4")).shape == (0, 65)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiler_sees_one_step(form: str):
    matrix = random_packed(65, 48, form=form)
    x = torch.randn(4, 48)
    compiled = torch.compile(lambda x: linear(x, matrix) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), linear(x, matrix) + 1)
    gate_up = random_packed(96, 48, form=form, experts=2)
    down = random_packed(48, 48, form=form, experts=2)
    route = {"weights": torch.rand(4, 1), "ids": torch.tensor([[0], [1], [1], [0]])}
    compiled = torch.compile(
        lambda x: experts(x, gate_up, down, **route), backend="eager", fullgraph=True
    )
    assert torch.equal(compiled(x), experts(x, gate_up, down, **route))


@pytest.mark.parametrize("form", FORMS)
@for_each(dtype=DTYPES)
def test_experts(form: str, dtype: torch.dtype):
    count, hidden, inner, rows, chosen = 6, 96, 48, 19, 3
    gate_up = random_packed(2 * inner, hidden, form=form, experts=count)
    down = random_packed(hidden, inner, form=form, experts=count, seed=1)
    random = torch.Generator().manual_seed(2)
    x = torch.randn(rows, hidden, generator=random).to(dtype)
    weights = torch.rand(rows, chosen, generator=random)
    ids = torch.stack([torch.randperm(count, generator=random)[:chosen] for _ in range(rows)])
    ids[0, 0] = ids[5, 2] = -1  # experts of another rank

    def plainly(compute: torch.dtype) -> torch.Tensor:
        total = torch.zeros(rows, hidden, dtype=compute)
        for expert in range(count):
            of_it, places = (ids == expert).nonzero(as_tuple=True)
            both = F.linear(x[of_it].to(compute), dequantise(gate_up[expert], compute))
            middle = F.gelu(both[:, :inner], approximate="tanh") * both[:, inner:]
            each = F.linear(middle, dequantise(down[expert], compute))
            total[of_it] += weights[of_it, places, None].to(compute) * each
        return total

    truth = plainly(torch.float64)
    ours = experts(x, gate_up, down, weights=weights, ids=ids)
    assert ours.dtype == dtype
    mine, theirs = (root_mean_square(y.double() - truth) for y in (ours, plainly(dtype)))
    assert mine <= 1.1 * theirs
