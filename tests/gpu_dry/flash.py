"""FlashAttention, dense and in torch: exactly what the arguments of vLLM's call ask for.

Mask functions, of version 4 alone, are CuTe, which is Python: they run on tensors of rows and keys
instead of registers, by what a handful of CuTe's names mean there.
"""

from __future__ import annotations

import functools
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from gpu_dry.tensors import DeviceTensor, unwrapped

if TYPE_CHECKING:
    from gpu_dry.graphs import Machine


def stand_in(machine: Machine) -> None:
    """Let vLLM's FLASH_ATTN backend call `attend`; without values the call is only counted."""
    from vllm.v1.attention.backends import flash_attn

    def kernel(**call: Any) -> None:
        version = call["fa_version"]
        # The others know neither flags of sequences nor mask functions.
        assert version == 4 or (call["dynamic_causal"] is None and call["mask_mod"] is None)
        call = pytree.tree_map_only(DeviceTensor, unwrapped, call)
        machine.launch(f"flash attention {version}", 1, lambda: attend(**call))
        if machine.values:
            with _disable_current_modes():
                attend(**call)

    flash_attn._FA4_DENSE_ATTENTION_KERNEL = kernel
    if machine.values:  # numbers are compared in float32, which the kernel itself does not take
        flash_attn.FlashAttentionBackend.supported_dtypes = [torch.float32]
    make = flash_attn._make_mm_prefix_mask_mod.__wrapped__

    @functools.cache
    def make_mask(*args: Any, **options: Any) -> Any:
        with patch.dict(sys.modules, _cute()):
            return make(*args, **options)

    flash_attn._make_mm_prefix_mask_mod = make_mask


def _cute() -> dict[str, Any]:
    cute = SimpleNamespace(jit=lambda function: function, TensorSSA=object)
    cutlass = SimpleNamespace(cute=cute, Int32=lambda x: x, min=_least, max=_most)
    ssa = SimpleNamespace(scalar_to_ssa=lambda x, _: x, ssa_to_scalar=lambda x: x)
    return {"cutlass": cutlass, "cutlass.cute": cute, "vllm.vllm_flash_attn.cute.utils": ssa}


def _least(a: Any, b: Any) -> Any:
    return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))


def _most(a: Any, b: Any) -> Any:
    return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))


def attend(
    *,
    q: torch.Tensor,  # [T, heads, D]
    k: torch.Tensor,  # [blocks, slots, key heads, D]
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None,
    dynamic_causal: torch.Tensor | None,
    mask_mod: Any,
    aux_tensors: list[torch.Tensor] | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softcap: float,
    **rest: Any,
) -> None:
    """Write the answer of every row of every sequence into `out`."""
    assert not softcap
    assert rest["alibi_slopes"] is None
    assert rest["s_aux"] is None
    starts = cu_seqlens_q.tolist()
    for index, length in enumerate(seqused_k.tolist()):
        first, behind = starts[index], starts[index + 1]
        rows = behind - first
        if rows == 0 or length == 0:
            continue
        assert rows <= max_seqlen_q
        assert length <= max_seqlen_k
        row = torch.arange(rows)[:, None]
        key = torch.arange(length)[None]
        if mask_mod is not None:
            # What version 4 does with a mask function: that mask is all it applies.
            assert not causal
            assert window_size is None
            assert dynamic_causal is None
            info = SimpleNamespace(seqlen_q=rows, seqlen_k=length, offset_q=first)
            keep = mask_mod([index], [0], row, key, info, aux_tensors)
        else:
            flag = causal if dynamic_causal is None else bool(dynamic_causal[index])
            keep = _window(row + length - rows, key, window_size, causal=flag)
        blocks = block_table[index].long()
        group = q.shape[1] // k.shape[2]
        keys, values = (
            x[blocks].flatten(0, 1)[:length].repeat_interleave(group, 1).float() for x in (k, v)
        )
        scores = torch.einsum("qhd,khd->hqk", q[first:behind].float(), keys) * softmax_scale
        scores = scores.masked_fill(~keep, -torch.inf)
        answer = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        out[first:behind] = answer.view_as(out[first:behind]).to(out.dtype)


def _window(
    position: torch.Tensor, key: torch.Tensor, window: list[int] | None, *, causal: bool
) -> torch.Tensor:
    """[rows, keys]: who sees whom by flag and window, in FlashAttention's terms."""
    left, right = window or (-1, -1)
    keep = torch.ones_like(position + key, dtype=torch.bool)
    if left >= 0:
        keep &= key >= position - left
    if causal:
        right = 0
    if right >= 0:
        keep &= key <= position + right
    return keep
