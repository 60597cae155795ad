"""Products with packed matrices on a CPU: a linear layer, and a layer of experts.

A panel of the matrix is unpacked into memory that is still in the cache, and torch multiplies with
it by its best kernel for the processor (AMX, AVX-512 BF16). What is read from memory is the packed
matrix, and no whole matrix ever exists unpacked. To a compiler each product is one opaque step.
"""

from __future__ import annotations

from collections.abc import Sequence  # noqa: TC003 -- custom_op reads it at run time
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_diffusion.quant import native
from vllm_diffusion.quant.packed import PackedMatrix

PANEL: Final = 512
"""Rows of a matrix that are unpacked at a time; benchmarks/packed_products.py compares others."""


def linear(x: Tensor, matrix: PackedMatrix, *, panel: int = PANEL) -> Tensor:
    """Multiply [R, K] fp32 or bf16 with the transpose of [N, K]: [R, N] of the same dtype."""
    if torch.compiler.is_compiling():
        step: Tensor = _linear_step(x, matrix.tensors)
        return step
    source = native.pointers(matrix)
    product = x.new_empty(x.shape[0], matrix.rows)
    unpacked = x.new_empty(min(panel, matrix.rows), matrix.inputs)
    for first in range(0, matrix.rows, panel):
        some = unpacked[: min(panel, matrix.rows - first)]
        native.unpack(source, first, some)
        torch.mm(x, some.t(), out=product[:, first : first + some.shape[0]])
    return product


def experts(
    x: Tensor, gate_up: PackedMatrix, down: PackedMatrix, *, weights: Tensor, ids: Tensor
) -> Tensor:
    """Sum over a row's experts of weight * down(gelu(gate) * up), gelu by tanh; [R, H] like `x`.

    Args:
        x: [R, H] fp32 or bf16.
        gate_up: [E, 2I, H], gate above up.
        down: [E, H, I].
        weights: [R, k] fp32.
        ids: [R, k] integers; those below 0 are experts of another rank and add nothing.
    """
    if torch.compiler.is_compiling():
        step: Tensor = _experts_step(x, gate_up.tensors, down.tensors, weights, ids)
        return step
    total = torch.zeros(x.shape, dtype=torch.float32)
    for number in torch.unique(ids[ids >= 0]).tolist():
        rows, places = (ids == number).nonzero(as_tuple=True)
        gate, up = linear(x[rows], gate_up[number]).float().chunk(2, dim=-1)
        inner = (F.gelu(gate, approximate="tanh") * up).to(x.dtype)
        each = linear(inner, down[number]).float() * weights[rows, places, None]
        total.index_add_(0, rows, each)
    return total.to(x.dtype)


@torch.library.custom_op("vllm_diffusion::packed_linear", mutates_args=())
def _linear_step(x: Tensor, matrix: Sequence[Tensor]) -> Tensor:
    return linear(x, PackedMatrix.of(matrix))


@_linear_step.register_fake
def _(x: Tensor, matrix: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], matrix[0].shape[0])


@torch.library.custom_op("vllm_diffusion::packed_experts", mutates_args=())
def _experts_step(
    x: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    weights: Tensor,
    ids: Tensor,
) -> Tensor:
    both = PackedMatrix.of(gate_up), PackedMatrix.of(down)
    return experts(x, *both, weights=weights, ids=ids)


@_experts_step.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    del others
    return torch.empty_like(x)
