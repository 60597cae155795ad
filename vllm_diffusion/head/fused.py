"""``tile.absorb`` as one Triton kernel for GPUs: a program a row, the tile in registers.

Imported on a GPU alone. The draw is the definition's without its bins: a running sum over the whole
tile costs nothing in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.tile import RunningStats

_MASKED = tl.constexpr(-3e30)  # as in ``tile``
_NEAR = tl.constexpr(0.625)


def absorb(
    running: RunningStats,
    logits: Tensor,
    *,
    first: int,
    softcap: float | None,
    temperature: Tensor,
    uniforms: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """See ``tile.absorb``; the weights take the place and the dtype of the logits.

    Args:
        running, first, softcap, temperature, uniforms: as there.
        logits: [R, n], n up to a tile.
    """
    rows, width = logits.shape
    shrink = torch.empty_like(running.top)
    gumbel, inside = uniforms
    block = max(16, triton.next_power_of_2(width))
    _absorb_row[(rows,)](
        logits,
        logits.stride(0),
        width,
        first,
        softcap or 0.0,
        temperature.contiguous(),
        gumbel,
        inside,
        gumbel.stride(0),
        running.top,
        running.second,
        running.mass,
        running.moment,
        running.score,
        running.argmax,
        running.sample,
        shrink,
        CAPPED=softcap is not None,
        BLOCK=block,
        num_warps=8,
    )
    return logits, shrink


@triton.jit
def hyperbolic(x: tl.tensor) -> tl.tensor:
    """The tanh of Cephes (Moshier), the same on every device and in the interpreter."""
    z = x * x
    near = z * -5.70498872745e-3 + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)  # a minimum would hide NaN
    return tl.where(size < _NEAR, near, tl.where(x < 0, -far, far))


@triton.jit
def _absorb_row(  # noqa: PLR0917 - a kernel is launched with positions
    logits: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    first: tl.tensor,
    softcap: tl.tensor,
    temperature: tl.tensor,
    gumbel: tl.tensor,
    inside: tl.tensor,
    uniform_stride: tl.tensor,
    tops: tl.tensor,
    seconds: tl.tensor,
    masses: tl.tensor,
    moments: tl.tensor,
    scores: tl.tensor,
    argmaxes: tl.tensor,
    samples: tl.tensor,
    shrinks: tl.tensor,
    CAPPED: tl.constexpr,  # noqa: N803 - Triton's way of writing constants
    BLOCK: tl.constexpr,  # noqa: N803
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < width
    x = tl.load(logits + row * stride + column, mask=there, other=0.0).to(tl.float32)
    if CAPPED:
        x = hyperbolic(x / softcap) * softcap
    x = tl.where(there, x, _MASKED)

    top = tl.max(x, axis=0)
    # Of equals the first; a row of NaN gets some place in the tile.
    place = tl.minimum(tl.min(tl.where(x == top, column, BLOCK), axis=0), width - 1)
    second = tl.max(tl.where(column == place, _MASKED, x), axis=0)
    before = tl.load(tops + row)
    now = tl.maximum(top, before)
    t = tl.load(temperature + row)
    shift = (before - now) / t
    shrink = tl.exp(shift)

    scaled = (x - now) / t
    weight = tl.exp(scaled)
    mass = tl.sum(weight, axis=0)
    moment = tl.sum(weight * scaled, axis=0)

    score = tl.log(mass) - tl.log(-tl.log(tl.load(gumbel + row * uniform_stride)))
    standing = tl.load(scores + row) + shift
    drawn = score > standing
    # The first id whose running sum is above its share, never one that adds nothing: a sum in
    # parallel rounds, so past the last of them it is the last that has any weight.
    cumulative = tl.cumsum(weight, axis=0)
    target = tl.load(inside + row * uniform_stride) * tl.max(cumulative, axis=0)
    chosen = tl.min(tl.where((cumulative > target) & (weight > 0), column, BLOCK), axis=0)
    last = tl.max(tl.where(weight > 0, column, 0), axis=0)
    chosen = tl.minimum(chosen, last)

    tl.store(logits + row * stride + column, weight.to(logits.dtype.element_ty), mask=there)
    standing_mass = tl.load(masses + row)
    standing_moment = tl.load(moments + row)
    tl.store(moments + row, shrink * (standing_moment + shift * standing_mass) + moment)
    tl.store(masses + row, shrink * standing_mass + mass)
    tl.store(scores + row, tl.where(drawn, score, standing))
    tl.store(samples + row, first + chosen, mask=drawn)
    tl.store(argmaxes + row, first + place, mask=top > before)
    known = tl.maximum(tl.load(seconds + row), second)
    tl.store(seconds + row, tl.maximum(tl.minimum(top, before), known))
    tl.store(tops + row, now)
    tl.store(shrinks + row, shrink)
