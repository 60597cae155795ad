"""LoRA adapters in a worker: which are loaded, in which slots, and which rows pass through which.

Takes the place of vLLM's adapter manager, in the runner and for its layers. vLLM's gives a request
one slot. A request of ours has two kinds of row, and where a family's adapters change them
differently (``AdapterForm.row_kinds``), an adapter takes a slot for each:

    slot p          factors of text rows: prompt, commits
    slot N + p      factors of canvas rows; N is --max-loras

Layers and their tensor-parallel cuts are vLLM's. Which rows a layer finds in which slot is said by
``rows``.
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
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_diffusion.engine.lora.admission import adapter_base
from vllm_diffusion.engine.lora.kernels import with_slots
from vllm_diffusion.engine.lora.peft import read_adapter
from vllm_diffusion.engine.lora.rows import NO_ADAPTER, rows_on
from vllm_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor, nn
    from vllm.config import VllmConfig
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    from vllm_diffusion.engine.lora.peft import Adapter, Parts
    from vllm_diffusion.engine.lora.rows import Rows

_PACKED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    # One name stands for vLLM's layer whose gate and up are one matrix.
    "experts": ["w13"],
}


class CanvasAdapters:
    """The adapters of one worker: what vLLM's runner calls its LoRA manager.

    Both caches forget what was used longest ago: ``max_loras`` adapters have slots,
    ``max_cpu_loras`` are in memory. An adapter is known by the id in its requests.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
        """Wrap every layer of ``model`` that may be adapted, in place."""
        lora = vllm_config.lora_config
        assert lora is not None
        assert lora.max_cpu_loras is not None
        self.base = adapter_base(vllm_config.model_config, lora)
        self._config = lora
        self._model_config = vllm_config.model_config
        self._device = device
        self._loaded: OrderedDict[int, Adapter] = OrderedDict()
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._pinned: set[int] = set()
        # [R] int32 on the device; None where no row of the batch has an adapter.
        self._text_slots: Tensor | None = None
        self._kinds = self.base.form.row_kinds
        self._layers = self._wrap(model)
        slots = self._slots_in_all
        self.take_rows(
            rows_on(device, vllm_config, slots=slots), rows_on(device, vllm_config, slots=slots)
        )

    @property
    def _slots_in_all(self) -> int:
        return len(self._kinds) * self._config.max_loras

    def _wrap(self, model: nn.Module) -> dict[str, BaseLayerWithLoRA]:
        matrices, serves = self.base.matrices, self.base.serves
        paths = {matrix.path for module, matrix in matrices.items() if serves(module)}
        slots = self._slots_in_all
        config = with_slots(self._config, slots)
        layers: dict[str, BaseLayerWithLoRA] = {}
        for path, layer in list(model.named_modules()):
            if path not in paths or not isinstance(layer, LinearBase | MoERunner):
                continue
            packed = _PACKED.get(path.rpartition(".")[2], [])
            try:
                adapted = from_layer(layer, slots, config, packed, self._model_config.hf_config)
            except AssertionError as error:  # how vLLM says that a kernel of experts takes none
                raise ConfigError(f"vLLM cannot adapt the layer {path}: {error}") from error
            if not isinstance(adapted, BaseLayerWithLoRA):
                raise ConfigError(f"vLLM cannot adapt the layer {path}: serve without LoRA.")
            replace_submodule(model, path, adapted)
            layers[path] = adapted
        return layers

    def take_rows(self, rows: Rows, conditioning_rows: Rows) -> None:
        """Let layers read their rows there; self-conditioning runs on those behind logits alone."""
        self._rows, self._conditioning_rows = rows, conditioning_rows
        conditioning = {each.path for each in self.base.matrices.values() if each.conditions}
        for path, layer in self._layers.items():
            layer.set_mapping((conditioning_rows if path in conditioning else rows).layers)

    # ---- before a forward ----

    def set_active_adapters(self, requests: Iterable[LoRARequest], mapping: LoRAMapping) -> None:
        """Give a batch's adapters their slots; the rows are text until ``place`` says otherwise."""
        for request in requests:
            if request.lora_int_id in self._loaded:
                self._use(request.lora_int_id)
            else:
                self.add_adapter(request)
        ids = np.asarray(mapping.index_mapping, dtype=np.int64)
        slots = np.full(ids.shape, NO_ADAPTER, dtype=np.int32)
        for adapter in np.unique(ids[ids > 0]).tolist():
            slots[ids == adapter] = self._slots[adapter]
        self._conditioning_rows.clear()
        if (slots == NO_ADAPTER).all():
            self._text_slots = None
            self._rows.clear()
        else:
            self._text_slots = async_tensor_h2d(slots, self._device)
            self._rows.assign(self._text_slots)

    def place(self, canvas_rows: Tensor, logit_rows: Tensor) -> None:
        """Tell text rows from canvas rows in the batch of ``set_active_adapters``.

        Args:
            canvas_rows: [max tokens, 1] bool, True where a row is a canvas row. Like all of this on
                the device, which alone knows.
            logit_rows: [R] rows that are given to self-conditioning, in this order.
        """
        if (slots := self._text_slots) is None:
            return
        canvas = canvas_rows[: len(slots), 0] & (slots != NO_ADAPTER)
        behind_text = (len(self._kinds) - 1) * self._config.max_loras
        slots = torch.where(canvas, slots + behind_text, slots)
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
                for kind, paths in enumerate(adapter[name] for name in self._kinds):
                    _set(layer, slot + kind * self._config.max_loras, paths.get(path))
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
        self._register(request.lora_int_id, {kind: {} for kind in self._kinds})
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


def _set(layer: BaseLayerWithLoRA, slot: int, parts: Parts | None) -> None:
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
