"""compressed-tensors on a CPU host, where stock vLLM runs neither released checkpoint.

vLLM 0.32 has no NVFP4 kernel for CPUs and no experts in FP8 by channel. Here the two released
schemes, NVFP4 and FP8 by channel, are weights only: matrices stay packed (`quant.product`), or,
where the C++ part is not built, are dequantised when they are loaded and run as plain ones.
Whatever else a checkpoint asks for goes to vLLM. Nothing of vLLM is replaced: the model class hands
its layers this configuration in place of the one vLLM read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import (
    FusedMoEMethodBase,
    FusedMoeWeightScaleSupported,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.quant import native, product
from vllm_diffusion.quant.packed import GROUP, PackedMatrix, dequantise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization import QuantizationConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

logger = init_logger(f"vllm.{__name__}")

NVFP4: Final = "NVFP4"
FP8: Final = "FP8"

_ACTIVATIONS: Final[Mapping[MoEActivation, Callable[[Tensor], Tensor]]] = {
    MoEActivation.GELU_TANH: product.gelu_tanh
}
