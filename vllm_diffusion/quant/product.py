"""Products with packed matrices on a CPU: a linear layer, and a layer of experts.

A panel of the matrix is unpacked while the one before it is hardly out of the cache, and torch
multiplies with it by its best kernel for the processor (AMX, AVX-512 BF16). What is read from
memory is the packed matrix, and no whole matrix ever exists unpacked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

from vllm_diffusion.quant import native

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_diffusion.quant.packed import PackedMatrix

PANEL: Final = 256
"""Rows of a matrix that are unpacked at a time; benchmarks/quantised.py compares others."""


def linear(x: Tensor, matrix: PackedMatrix, *, panel: int = PANEL) -> Tensor:
    """x @ w.T: [R, K] fp32 or bf16 with w [N, K] -> [R, N] of the same dtype."""
    source = native.pointers(matrix)
    product = x.new_empty(x.shape[0], matrix.rows)
    unpacked = x.new_empty(min(panel, matrix.rows), matrix.inputs)
    for first in range(0, matrix.rows, panel):
        some = unpacked[: min(panel, matrix.rows - first)]
        native.unpack(source, first, some)
        torch.mm(x, some.t(), out=product[:, first : first + some.shape[0]])
    return product


def experts(
    x: Tensor,
    gate_up: PackedMatrix,
    down: PackedMatrix,
    *,
    weights: Tensor,
    ids: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Sum over a row's experts of weight * down(activation(gate) * up); [R, H] like `x`.

    Args:
        x: [R, H] fp32 or bf16.
        gate_up: [E, 2I, H], gate above up.
        down: [E, H, I].
        weights: [R, k] fp32.
        ids: [R, k] integers; rows below 0 are experts that are not here and add nothing.
        activation: of the gate, applied in fp32.
    """
    total = torch.zeros(x.shape, dtype=torch.float32)
    for number in torch.unique(ids[ids >= 0]).tolist():
        rows, places = (ids == number).nonzero(as_tuple=True)
        gate, up = linear(x[rows], gate_up[number]).float().chunk(2, dim=-1)
        inner = (activation(gate) * up).to(x.dtype)
        each = linear(inner, down[number]).float() * weights[rows, places, None]
        total.index_add_(0, rows, each)
    return total.to(x.dtype)


def gelu_tanh(gate: Tensor) -> Tensor:
    """The activation of Gemma's experts."""
    return F.gelu(gate, approximate="tanh")
