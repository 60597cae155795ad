"""A diffusion model gets our manager of LoRA adapters, and experts that adapters can change.

In a worker the runner makes its own manager of adapters, and experts are given Triton's kernel as
soon as LoRA is on, on a CPU too, and where no adapter may change them.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

from vllm_diffusion.upstream.cpu_host import is_triton_free_cpu
from vllm_diffusion.upstream.runner import is_diffusion

if TYPE_CHECKING:
    from collections.abc import Callable


def bring_manager(load: Callable[..., Any]) -> Callable[..., Any]:
    """Make `LoRAModelRunnerMixin.load_lora_model` give a diffusion model our manager."""

    def load_ours(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
        if not is_diffusion(vllm_config):
            return load(self, model, vllm_config, device)
        from vllm_diffusion.engine.lora.slots import CanvasAdapters

        self.lora_manager = model.adapters = CanvasAdapters(model, vllm_config, device)
        return model

    return load_ours


def choose_experts(select: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make experts those of an engine without LoRA unless adapters change them; on a CPU, ours.

    Wraps `select_unquantized_moe_backend`.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    def chosen(moe_config: Any) -> Any:
        vllm_config = get_current_vllm_config()
        if not moe_config.is_lora_enabled or not is_diffusion(vllm_config):
            return select(moe_config)
        from vllm_diffusion.engine.lora.admission import adapts_experts
        from vllm_diffusion.engine.lora.experts import AdaptedExperts

        lora = vllm_config.lora_config
        assert lora is not None
        if not adapts_experts(vllm_config.model_config, lora):
            return select(dataclasses.replace(moe_config, is_lora_enabled=False))
        if not is_triton_free_cpu():
            return select(moe_config)
        return UnquantizedMoeBackend.CPU, AdaptedExperts

    return chosen


def manager_is_fixed() -> bool:
    """Whether the runner still makes its manager itself."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    source = inspect.getsource(inspect.unwrap(LoRAModelRunnerMixin.load_lora_model))
    return "self.lora_manager = LRUCacheWorkerLoRAManager(" in source


def adapted_experts_are_triton() -> bool:
    """Whether LoRA still means Triton experts, whatever the platform."""
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    source = inspect.getsource(inspect.unwrap(unquantized.select_unquantized_moe_backend))
    adapted = source.partition("if moe_config.is_lora_enabled:")[2].partition("\n    # NOTE")[0]
    return "UnquantizedMoeBackend.TRITON" in adapted and "is_cpu" not in source
