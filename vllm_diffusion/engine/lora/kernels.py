"""The rows of a forward by slot, as vLLM's Triton kernels for adapters on GPUs read them.

Whether a row belongs to a canvas is known on the device alone: it depends on whether the last step
finished the canvas. vLLM sorts rows by adapter with values read back to the host. Here every slot
has a fixed place, and kernels leave one without rows at once, so how many rows a slot has and where
they start follow on the device. What captured graphs read stays at one address.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config.lora import LoRAConfig


def with_slots(lora: LoRAConfig, slots: int) -> LoRAConfig:
    """The options that layers and kernels are to see: as many adapters as there are slots.

    Kernels start as many programs as there are slots: how many are in use only the device knows.
    """
    kept = max(slots, lora.max_cpu_loras or 0)
    return replace(lora, max_loras=slots, max_cpu_loras=kept, specialize_active_lora=False)


class KernelRows:
    """The rows of every slot in vLLM's metadata; layers multiply with vLLM's punica wrapper."""

    def __init__(self, lora: LoRAConfig, max_rows: int, device: torch.device) -> None:
        """Without a row of any slot.

        Args:
            lora: ``max_loras`` is the number of slots.
            max_rows: most rows of a forward.
            device: of the rows.
        """
        from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

        slots = lora.max_loras
        self.layers = PunicaWrapperGPU(max_rows, max_rows, device, lora_config=lora)
        """What layers are given."""
        self._meta = self.layers.token_mapping_meta
        # Rows without an adapter come last, where some of the kernels do not even look.
        self._places = torch.arange(slots + 1, dtype=torch.int32, device=device)
        self._meta.token_lora_mapping.fill_(-1)
        self._meta.active_lora_ids.copy_(self._places).masked_fill_(self._places == slots, -1)
        self.clear()

    def clear(self) -> None:
        """No row has an adapter: no kernel starts."""
        self._meta.no_lora_flag_cpu.fill_(True)

    def assign(self, slots: Tensor) -> None:
        """Set the slot of every row of what the layers will be given.

        Nothing is read on the host, so kernels start even where no row has a slot.

        Args:
            slots: [R] int32 on the device, -1 where a row has no adapter. Rows behind them, which
                pad a captured graph, have none.
        """
        meta, rows = self._meta, len(slots)
        place = torch.where(slots < 0, self._places[-1], slots)
        counts = (place == self._places[:, None]).sum(1, dtype=torch.int32)
        meta.token_lora_mapping[:rows].copy_(slots)
        meta.token_lora_mapping[rows:].fill_(-1)
        meta.token_indices_sorted_by_lora_ids[:rows].copy_(torch.argsort(place, stable=True))
        meta.num_tokens_per_lora.copy_(counts)
        meta.lora_token_start_loc[1:].copy_(counts.cumsum(0))
        meta.no_lora_flag_cpu.fill_(False)
