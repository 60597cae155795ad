"""Stock vLLM still runs neither released form on a CPU; where it does, ours has a peer to beat."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.kernels.linear import init_nvfp4_linear_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend, select_fp8_moe_backend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import select_nvfp4_moe_backend
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8DynamicTokenSym,
    kFp8StaticChannelSym,
    kNvfp4Dynamic,
    kNvfp4Static,
)
from vllm.platforms import current_platform

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not current_platform.is_cpu(), reason="about CPU hosts"),
]

EXPERTS = FusedMoEConfig(
    num_experts=128,
    experts_per_token=8,
    hidden_dim=2816,
    intermediate_size=704,
    num_local_experts=128,
    num_logical_experts=128,
    activation=MoEActivation.GELU_TANH,
    device="cpu",
    routing_method=RoutingMethodType.Custom,
    moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
    in_dtype=torch.bfloat16,
)


def test_there_is_no_nvfp4_linear_kernel():
    with pytest.raises(ValueError, match="Failed to find a kernel"):
        init_nvfp4_linear_kernel()


def test_there_are_no_nvfp4_experts():
    with pytest.raises(NotImplementedError, match="No NvFp4 MoE backend"):
        select_nvfp4_moe_backend(EXPERTS, weight_key=kNvfp4Static, activation_key=kNvfp4Dynamic)


def test_there_are_no_fp8_experts_by_channel():
    backend, experts = select_fp8_moe_backend(
        EXPERTS,
        weight_key=kFp8StaticChannelSym,
        activation_key=kFp8DynamicTokenSym,
        allow_vllm_cutlass=True,
    )
    assert (backend, experts) == (Fp8MoeBackend.NONE, None)
