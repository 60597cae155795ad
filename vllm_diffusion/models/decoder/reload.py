"""Weights that are loaded again while the engine runs (`reload_weights`), where vLLM needs help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from torch import nn


def pack_experts_again(model: nn.Module) -> None:
    """Let the experts of a CPU host be packed as they were at first; call before loading again.

    vLLM 0.32 packs them when it builds their kernel, which it does once: what is loaded later would
    stay in the order of the file, and the kernel would take it for packed.
    """
    if not current_platform.is_cpu():
        return  # captured graphs hold on to the kernel
    for module in model.modules():
        if not isinstance(module, RoutedExperts):
            continue
        if isinstance(module.quant_method, UnquantizedFusedMoEMethod):
            module.quant_method.moe_kernel = None
