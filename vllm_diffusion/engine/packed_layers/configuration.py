"""Which layers of a quantised checkpoint are ours on a CPU host, and which vLLM's.

vLLM 0.32 has no NVFP4 kernel for CPUs and no experts in FP8 by channel. Ours keep the weights of
both packed and leave activations as they are, see `layers`: NVFP4 of compressed-tensors and of
Model Optimizer, and FP8 by channel. Every other scheme is left to vLLM. No patch is needed: the
model class gives its layers our configuration in place of the one that vLLM read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from vllm_diffusion.engine.packed_layers.forms import OPTIMIZER_NVFP4, described, form_of
from vllm_diffusion.engine.packed_layers.layers import HostExperts, HostLinear
from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.quant.packed import GROUP

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization import QuantizationConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

    from vllm_diffusion.engine.packed_layers.forms import WeightForm

_REFUSALS: Final = (AssertionError, NotImplementedError, RuntimeError, ValueError)
"""What vLLM raises where it has no scheme or no kernel for a layer."""


def adopt(config: QuantizationConfig | None) -> None:
    """Turn the configuration that vLLM read into ours, in place; does nothing on a GPU."""
    ours = {CompressedTensorsConfig: HostQuantisation, ModelOptNvFp4Config: HostOptimizer}
    if current_platform.is_cpu() and type(config) in ours:
        config.__class__ = ours[type(config)]


def is_released(config: QuantizationConfig | None) -> bool:
    """Whether every scheme of a checkpoint is a released one, whose tensors we know by name."""
    if isinstance(config, HostOptimizer):
        return True
    if not isinstance(config, CompressedTensorsConfig):
        return False
    schemes = config.target_scheme_map.values()
    return bool(schemes) and all(form_of(scheme) is not None for scheme in schemes)


class HostQuantisation(CompressedTensorsConfig):
    """The configuration of a compressed-tensors checkpoint, for layers on a CPU."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer stores and uses its weights.

        Raises:
            CheckpointError: the layer's scheme is one that nothing here can run.
        """
        schemes = self._schemes(layer, prefix)
        forms = {form_of(scheme) for scheme in schemes}
        form = forms.pop() if len(forms) == 1 else None
        if form is not None:
            return _method(layer, form)
        try:
            return super().get_quant_method(layer, prefix)
        except _REFUSALS as error:
            raise _refused(prefix, described(schemes), error) from error

    def _schemes(self, layer: nn.Module, prefix: str) -> list[dict[str, Any] | None]:
        """The schemes of a layer's matrices; empty for a layer that is left to vLLM."""
        if isinstance(layer, RoutedExperts):
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            # In the file every expert is three linear layers, and that is what a scheme targets.
            linear = nn.Linear(1, 1, device="meta")
            return [self.get_scheme_dict(linear, f"{prefix}.0.{name}") for name in names]
        if isinstance(layer, LinearBase):
            return [self.get_scheme_dict(layer, prefix)]
        return []


class HostOptimizer(ModelOptNvFp4Config):
    """The configuration of a Model Optimizer checkpoint in NVFP4, for layers on a CPU."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer stores and uses its weights.

        Raises:
            CheckpointError: its groups are of another size, or it is the head.
        """
        quantised = isinstance(layer, LinearBase | RoutedExperts)
        # vLLM's rule too: files list the tower under names that their patterns do not match.
        if quantised and not self.is_layer_excluded(prefix) and "vision_tower" not in prefix:
            if self.group_size != GROUP:
                raise _refused(prefix, f"NVFP4 in groups of {self.group_size}", None)
            return _method(layer, OPTIMIZER_NVFP4)
        if isinstance(layer, ParallelLMHead) and self.is_layer_excluded(prefix):
            # The default. vLLM would make a linear layer of it, which packs its weights on a CPU,
            # and they are the embedding's too.
            return None
        try:
            return super().get_quant_method(layer, prefix)
        except _REFUSALS as error:
            raise _refused(prefix, self.quant_method, error) from error


def _method(layer: nn.Module, form: WeightForm) -> HostLinear | HostExperts:
    return HostExperts(layer, form) if isinstance(layer, RoutedExperts) else HostLinear(form)


def _refused(prefix: str, asked: str, error: Exception | None) -> CheckpointError:
    why = f": {str(error) or type(error).__name__}" if error else ""
    return CheckpointError(
        f"{prefix} is quantised in a way that a CPU cannot run ({asked}){why}. On a CPU these run: "
        f"NVFP4 in groups of {GROUP} (W4A4 or W4A16), FP8 by channel with dynamic activations, and "
        "what vLLM itself runs there."
    )
