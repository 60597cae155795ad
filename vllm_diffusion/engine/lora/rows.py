"""The rows of a forward by slot: what a layer asks when it applies adapters.

What a layer calls to apply its factors holds the rows of every slot, set before a forward. On a GPU
that is vLLM's punica wrapper (``kernels``). On a CPU it is `AdapterRows`, which multiplies slot by
slot: vLLM's own form for CPU hosts copies the factors of every row, and gives rows without an
adapter those of the last slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from vllm_diffusion.engine.lora.kernels import KernelRows, with_slots

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from vllm.config import VllmConfig

NO_ADAPTER = -1
"""The slot of a row without an adapter."""

_PADDING = 8  # a captured graph's rows are a multiple of it


class AdapterRows:
    """The rows of the current forward by slot, and the product that layers ask for.

    Stands for vLLM's punica wrapper, of which adapted layers call one method.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[int, Tensor]] = []

    @property
    def layers(self) -> AdapterRows:
        """What layers are given."""
        return self

    def clear(self) -> None:
        """No row has an adapter."""
        self.groups = []

    def assign(self, slots: Tensor) -> None:
        """Set the slot of every row of what the layers will be given.

        Args:
            slots: [R] int32 on the host, -1 where a row has no adapter.
        """
        self.groups = [
            (slot, (slots == slot).nonzero().flatten())
            for slot in sorted(set(slots.tolist()) - {NO_ADAPTER})
        ]

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
    ) -> None:
        """Y += x @ a.T @ b.T for every row with an adapter, slice by slice of the outputs.

        Args:
            y: [R, outputs], changed in place.
            x: [R, inputs].
            lora_a_stacked: a slice [slots, 1, rank, inputs].
            lora_b_stacked: a slice [slots, 1, its outputs, rank].
            scale: always 1, it is in the factors.
            output_slices: outputs of every slice.
        """
        assert scale == 1.0
        for slot, rows in self.groups:
            given = x[rows].to(lora_a_stacked[0].dtype)
            start = 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                change = given @ a[slot, 0].T @ b[slot, 0].T
                y[rows, start : start + size] += change.to(y.dtype)
                start += size


Rows: TypeAlias = AdapterRows | KernelRows


def rows_on(device: torch.device, vllm_config: VllmConfig, *, slots: int) -> Rows:
    """The rows of a worker on this device, by slot.

    Args:
        device: of the rows.
        vllm_config: of the engine, with LoRA.
        slots: how many there are.
    """
    if device.type == "cpu":
        return AdapterRows()
    lora = vllm_config.lora_config
    assert lora is not None
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    padded = -(-tokens // _PADDING) * _PADDING
    return KernelRows(with_slots(lora, slots), padded, device)
