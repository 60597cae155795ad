"""Products with packed weights at one of the released sizes, timed by pytest-benchmark.

    scripts/test tests/ops/test_packed_speed.py

`benchmarks/packed_products.py` has experts, other numbers of rows, and what vLLM runs for plain
weights. Time has no bound here, which a busy host would break; the error has, that of plain bf16
weights.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.packed import random_packed

from vllm_diffusion.quant import native
from vllm_diffusion.quant.packed import dequantise
from vllm_diffusion.quant.product import linear

pytestmark = pytest.mark.skipif(native.library() is None, reason="the C++ part is not built")


@pytest.mark.parametrize("form", ["plain", "nvfp4", "fp8"])
def test_a_linear_layer(form, benchmark):
    rows, inputs, outputs = 64, 2816, 2112
    matrix = random_packed(outputs, inputs, form="nvfp4" if form == "plain" else form)
    plain = dequantise(matrix, torch.bfloat16)
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run():
        return F.linear(x, plain) if form == "plain" else linear(x, matrix)

    benchmark.group = f"{rows} rows, {inputs} to {outputs}, bf16"
    product = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    truth = x.double() @ dequantise(matrix, torch.float64).T
    ours, theirs = (
        (y.double() - truth).square().mean().sqrt() for y in (product, F.linear(x, plain))
    )
    assert ours <= 1.1 * theirs
