"""LoRA adapters in a worker: which are loaded, in which slot, and which rows pass through which.

Takes the place of vLLM's adapter manager, in the runner and for its layers. vLLM's gives a request
one slot. A request of ours has two kinds of row, and an adapter may change them differently (see
``models.diffusion_gemma.adapter``), so an adapter takes a pair of slots:

    slot p          factors of text rows: prompt, commits
    slot N + p      factors of canvas rows; N is --max-loras

Layers and their tensor-parallel cuts are vLLM's. What a layer calls to apply its factors is
`AdapterRows`: it holds the rows of every slot, set before a forward, and multiplies slot by slot.
vLLM's own form for CPU hosts copies the factors of every row, and gives rows without an adapter
those of the last slot.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.utils import from_layer, get_adapter_absolute_path, replace_submodule
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.layers.linear import LinearBase

from vllm_diffusion.engine.lora import adapter_base
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.models.diffusion_gemma.adapter import (
    Adapter,
    Factors,
    placed_at,
    read_adapter,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from vllm.config import VllmConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

_UNCHANGED = Adapter(text={}, canvas={})

_NO_ADAPTER = -1
_PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    # One name stands for vLLM's layer whose gate and up are one matrix.
    "experts": ["w13"],
}


class AdapterRows:
    """The rows of the current forward by slot, and the product that layers ask for.

    Stands for vLLM's punica wrapper, of which adapted layers call one method.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[int, Tensor]] = []

    def assign(self, slots: Tensor) -> None:
        """Set the slot of every row of what the layers will be given.

        Args:
            slots: [R] int64 on the host, -1 where a row has no adapter.
        """
        self.groups = [
            (slot, (slots == slot).nonzero().flatten())
            for slot in sorted(set(slots.tolist()) - {_NO_ADAPTER})
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


class CanvasAdapters:
    """The adapters of one worker: what vLLM's runner calls its LoRA manager.

    Both caches forget what was used longest ago: ``max_loras`` adapters have slots,
    ``max_cpu_loras`` are in memory. An adapter is known by the id in its requests.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig) -> None:
        """Wrap every layer of ``model`` that may be adapted, in place."""
        lora = vllm_config.lora_config
        assert lora is not None
        assert lora.max_cpu_loras is not None
        self.base = adapter_base(vllm_config.model_config, lora)
        self._config = lora
        self._model_config = vllm_config.model_config
        self._loaded: OrderedDict[int, Adapter] = OrderedDict()
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._pinned: set[int] = set()
        self._rows = AdapterRows()
        # Self-conditioning runs on the rows behind logits alone.
        self._conditioning_rows = AdapterRows()
        self._text_slots = torch.empty(0, dtype=torch.int64)
        self._layers = self._wrap(model)

    def _wrap(self, model: nn.Module) -> dict[str, BaseLayerWithLoRA]:
        paths = {placed_at(module)[0] for module in self.base.shapes if self.base.serves(module)}
        layers: dict[str, BaseLayerWithLoRA] = {}
        for path, layer in list(model.named_modules()):
            if path not in paths or not isinstance(layer, LinearBase | MoERunner):
                continue
            adapted = from_layer(
                layer,
                2 * self._config.max_loras,
                self._config,
                _PACKED.get(path.rpartition(".")[2], []),
                self._model_config.hf_config,
            )
            if not isinstance(adapted, BaseLayerWithLoRA):
                raise ConfigError(f"vLLM cannot adapt the layer {path}: serve without LoRA.")
            replace_submodule(model, path, adapted)
            conditioning = path.startswith("self_conditioning.")
            adapted.set_mapping(self._conditioning_rows if conditioning else self._rows)
            layers[path] = adapted
        return layers

    # ---- before a forward ----

    def set_active_adapters(self, requests: Iterable[LoRARequest], mapping: LoRAMapping) -> None:
        """Give a batch's adapters their slots; the rows are text until ``place`` says otherwise."""
        for request in requests:
            if request.lora_int_id in self._loaded:
                self._use(request.lora_int_id)
            else:
                self.add_adapter(request)
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        slots = np.full(ids.shape, _NO_ADAPTER, dtype=np.int64)
        for adapter in np.unique(ids[ids > 0]).tolist():
            slots[ids == adapter] = self._slots[adapter]
        self._text_slots = torch.from_numpy(slots)
        self._rows.assign(self._text_slots)

    def place(self, canvas_rows: Tensor, logit_rows: Tensor) -> None:
        """Tell text rows from canvas rows in the batch of ``set_active_adapters``.

        Args:
            canvas_rows: [max tokens, 1] bool, True where a row is a canvas row.
            logit_rows: [R] rows that are given to self-conditioning, in this order.
        """
        slots = self._text_slots
        canvas = canvas_rows[: len(slots), 0] & (slots != _NO_ADAPTER)
        slots = torch.where(canvas, slots + self._config.max_loras, slots)
        self._rows.assign(slots)
        self._conditioning_rows.assign(slots[logit_rows])

    # ---- the life of an adapter ----

    def add_adapter(self, request: LoRARequest) -> bool:
        """Load it unless it is loaded, or is to be loaded in place, and give it slots.

        Raises:
            LoRAAdapterNotFoundError: there is no such folder.
            AdapterError: it does not fit; nothing has changed.
        """
        number = request.lora_int_id
        if number not in self._loaded or request.load_inplace:
            folder = Path(get_adapter_absolute_path(request.lora_path))
            if not folder.is_dir():
                raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
            adapter = read_adapter(folder, self.base, self._dtype)
            self.remove_adapter(number)
            self._register(number, adapter)
        self._use(number)
        return True

    def _use(self, number: int) -> None:
        """Give a loaded adapter slots, and remember that it was used."""
        self._loaded.move_to_end(number)
        self._activate(number)

    def _register(self, number: int, adapter: Adapter) -> None:
        most = self._config.max_cpu_loras
        assert most is not None
        while len(self._loaded) >= most:
            self.remove_adapter(self._oldest(self._loaded))
        self._loaded[number] = adapter

    def _activate(self, number: int) -> None:
        if number not in self._slots:
            if len(self._slots) == self._config.max_loras:
                del self._slots[self._oldest(self._slots)]
            slot = min(set(range(self._config.max_loras)) - set(self._slots.values()))
            adapter = self._loaded[number]
            for path, layer in self._layers.items():
                _set(layer, slot, adapter.text.get(path))
                _set(layer, slot + self._config.max_loras, adapter.canvas.get(path))
            self._slots[number] = slot
        self._slots.move_to_end(number)

    def _oldest(self, cache: Mapping[int, Any]) -> int:
        free = (number for number in cache if number not in self._pinned)
        if (number := next(free, None)) is None:
            raise RuntimeError("every adapter is pinned, and there is no slot for another one")
        return number

    @property
    def _dtype(self) -> torch.dtype:
        dtype = self._config.lora_dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def remove_adapter(self, number: int) -> bool:
        """Forget it; False if it was not loaded."""
        self._pinned.discard(number)
        self._slots.pop(number, None)
        return self._loaded.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        """Forget all of them."""
        for number in list(self._loaded):
            self.remove_adapter(number)

    def pin_adapter(self, number: int) -> bool:
        """Keep it in memory and in its slots.

        Raises:
            ValueError: it is not loaded.
        """
        if number not in self._loaded:
            raise ValueError(f"adapter {number} cannot be pinned: it is not loaded")
        self._activate(number)
        self._pinned.add(number)
        return True

    def list_adapters(self) -> set[int]:
        """Ids of those in memory."""
        return set(self._loaded)

    # ---- what the runner asks while it warms up ----

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Register an adapter that changes nothing: what it costs does not depend on values."""
        del rank
        self._register(request.lora_int_id, _UNCHANGED)
        return True

    def get_dummy_lora_warmup_rank(self, default: int) -> int:
        """The rank it would have."""
        return default

    @contextlib.contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing to keep."""
        yield

    def supports_tower_connector_lora(self) -> bool:
        """The vision tower has no adapters."""
        return False


def _set(layer: BaseLayerWithLoRA, slot: int, parts: tuple[Factors | None, ...] | None) -> None:
    """Write factors into a slot of a layer, or clear it."""
    if parts is None:
        layer.reset_lora(slot)
    elif len(parts) == 1:
        assert parts[0] is not None
        layer.set_lora(slot, parts[0].a, parts[0].b)
    else:
        layer.set_lora(
            slot,
            [None if part is None else part.a for part in parts],
            [None if part is None else part.b for part in parts],
        )
