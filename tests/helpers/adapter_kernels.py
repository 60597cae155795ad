"""vLLM's kernels for adapters on GPUs, as plain products over the rows their metadata name.

For tests of the metadata: what the kernels themselves do is held against the truth in Triton's
interpreter (``tests/engine/test_lora_kernels.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.lora.punica_wrapper import punica_gpu

from vllm_diffusion.engine.lora.kernels import KernelRows, with_slots

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest
    from torch import Tensor
    from vllm.config.lora import LoRAConfig


def rows_by_slot(meta: Sequence[Any]) -> dict[int, list[int]]:
    """The rows of every slot as a kernel finds them, place by place.

    Args:
        meta: of ``LoRAKernelMeta.meta_args``.
    """
    _, order, counts, starts, slots, no_adapter, places = meta
    if no_adapter:
        return {}
    found = {}
    for place in range(int(places)):
        rows = order[starts[place] : starts[place] + counts[place]].tolist()
        if rows and slots[place] >= 0:
            found[int(slots[place])] = rows
    return found


def shrink(x: Tensor, weights: Sequence[Tensor], out: Tensor, *rest: Any) -> None:
    """Every slice of ``out`` is x @ a.T of a row's slot."""
    *meta, scale = rest
    for slot, rows in rows_by_slot(meta).items():
        for part, a in zip(out, weights, strict=True):
            part[rows] = (x[rows] @ a[slot, 0].T).to(part.dtype) * scale


def expand(
    x: Tensor,
    weights: Sequence[Tensor],
    out: Tensor,
    *meta: Any,
    offset_start: int = 0,
    add_inputs: bool = False,
) -> None:
    """Add to every slice of the columns of ``out`` its x @ b.T."""
    assert add_inputs
    for slot, rows in rows_by_slot(meta).items():
        start = offset_start
        for part, b in zip(x, weights, strict=True):
            change = part[rows] @ b[slot, 0].T.to(part.dtype)
            out[rows, start : start + b.shape[2]] += change.to(out.dtype)
            start += b.shape[2]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give vLLM's wrapper for GPUs, where Triton is absent, its metadata and these kernels."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    monkeypatch.setattr(punica_gpu, "LoRAKernelMeta", LoRAKernelMeta, raising=False)
    monkeypatch.setattr(punica_gpu, "lora_shrink", shrink, raising=False)
    monkeypatch.setattr(punica_gpu, "lora_expand", expand, raising=False)
    # What our experts for CPUs ask of a wrapper.
    monkeypatch.setattr(punica_gpu.PunicaWrapperGPU, "groups", property(_groups), raising=False)


def _groups(wrapper: Any) -> list[tuple[int, Tensor]]:
    meta = wrapper.token_mapping_meta
    found = rows_by_slot(meta.meta_args(len(meta.token_lora_mapping), specialize_active_lora=False))
    return [(slot, torch.tensor(rows)) for slot, rows in found.items()]


def make_rows(lora: LoRAConfig, max_rows: int) -> KernelRows:
    """The rows of a worker on a GPU, on a CPU; ``lora`` as a user sets it."""
    return KernelRows(with_slots(lora, 2 * lora.max_loras), max_rows, torch.device("cpu"))
