"""``inputs.condition`` for GPUs: two Triton kernels around the layer's two matrix products.

Imported only on a GPU. Rounds where the layers round: after each norm, and after the sum that the
last norm reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.family import SelfConditioning


def condition(
    embeds: Tensor,
    canvas_rows: Tensor,
    *,
    rows: Tensor,
    slots: Tensor,
    place: Tensor,
    phase: Tensor,
    soft: Tensor,
    layer: SelfConditioning,
    adapters: Any,
) -> None:
    """See ``inputs.condition``."""
    count, width = rows.shape[0], embeds.shape[1]
    block = triton.next_power_of_2(width)
    believed = torch.empty(count, width, dtype=soft.dtype, device=soft.device)
    _load_soft_embeddings[(count,)](
        soft,
        soft.stride(0),
        soft.stride(1),
        slots,
        place,
        rows,
        phase,
        layer.pre_norm.weight,
        believed,
        canvas_rows,
        width,
        layer.pre_norm.variance_epsilon,
        BLOCK=block,
        num_warps=8,
    )
    if adapters is not None:
        adapters.place(canvas_rows, rows)
    _add_embeddings[(count,)](
        embeds,
        layer.inner(believed),
        rows,
        canvas_rows,
        width,
        layer.post_norm.variance_epsilon,
        BLOCK=block,
        num_warps=8,
    )


@triton.jit
def _load_soft_embeddings(
    soft: tl.tensor,
    slot_stride: tl.tensor,
    place_stride: tl.tensor,
    slots: tl.tensor,
    place: tl.tensor,
    rows: tl.tensor,
    phase: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    canvas_rows: tl.tensor,
    width: tl.constexpr,
    eps: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton's custom for compile-time arguments
) -> None:
    """Load and normalise a row's soft embedding, and mark the row as a canvas row."""
    at = tl.program_id(0)
    slot = tl.load(slots + at).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    source = soft + slot * slot_stride + tl.load(place + at).to(tl.int64) * place_stride
    x = tl.load(source + column, mask=inside, other=0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    w = tl.load(weight + column, mask=inside, other=0)
    x = x.to(w.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(out + at.to(tl.int64) * width + column, x.to(out.dtype.element_ty), mask=inside)
    tl.store(canvas_rows + tl.load(rows + at), tl.load(phase + slot) == 0)


@triton.jit
def _add_embeddings(
    embeds: tl.tensor,
    inner: tl.tensor,
    rows: tl.tensor,
    canvas_rows: tl.tensor,
    width: tl.constexpr,
    eps: tl.constexpr,
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    """Add the layer's output to a canvas row's embedding and normalise the sum."""
    at = tl.program_id(0)
    row = tl.load(rows + at).to(tl.int64)
    if tl.load(canvas_rows + row) != 0:
        column = tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(embeds + row * width + column, mask=inside, other=0).to(tl.float32)
        y = tl.load(inner + at.to(tl.int64) * width + column, mask=inside, other=0)
        x = (x + y.to(tl.float32)).to(embeds.dtype.element_ty).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(embeds + row * width + column, x.to(embeds.dtype.element_ty), mask=inside)
