"""Which kernels vLLM picks for the released quantised checkpoints on three generations of GPU.

vLLM's own selectors run, on a platform that says it is such a GPU; no kernel does. Names and
ignore list go through the model class's mapping, so a prefix that does not match shows here as a
layer without quantisation. What the CUDA wheel was compiled for is an assumption, stated in GPUS.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.linear import QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.utils import nvfp4_utils
from vllm.platforms import Platform, PlatformEnum, current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.utils import flashinfer

from vllm_diffusion.engine.packed_layers.configuration import adopt
from vllm_diffusion.models.diffusion_gemma.model import DiffusionGemmaForBlockDiffusion
from vllm_diffusion.models.diffusion_gemma.testing.quantisable import plain_linears
from vllm_diffusion.testing.quantise import quantisation_config

pytestmark = pytest.mark.vllm

# Capability -> whether the wheel has FP4 CUTLASS and grouped FP8 GEMM kernels for it.
GPUS = {"sm_90": (9, 0, False, True), "sm_100": (10, 0, True, True), "sm_120": (12, 0, True, False)}

# (GPU, FlashInfer is installed) -> kernel of the linear layers, backend of the experts.
NVFP4 = {
    ("sm_90", True): ("MarlinNvFp4LinearKernel", "MARLIN"),
    ("sm_90", False): ("MarlinNvFp4LinearKernel", "MARLIN"),
    ("sm_100", True): ("FlashInferCuteDslNvFp4LinearKernel", "FLASHINFER_TRTLLM"),
    ("sm_100", False): ("CutlassNvFp4LinearKernel", "VLLM_CUTLASS"),
    ("sm_120", True): ("FlashInferCutlassNvFp4LinearKernel", "FLASHINFER_CUTLASS"),
    ("sm_120", False): ("CutlassNvFp4LinearKernel", "VLLM_CUTLASS"),
}
FP8 = {
    "sm_90": ("CutlassFP8ScaledMMLinearKernel", "VLLM_CUTLASS"),
    "sm_100": ("CutlassFP8ScaledMMLinearKernel", "VLLM_CUTLASS"),
    "sm_120": ("CutlassFP8ScaledMMLinearKernel", "TRITON"),
}
CASES = [
    ("nvfp4", gpu, with_flashinfer, *chosen) for (gpu, with_flashinfer), chosen in NVFP4.items()
]
CASES += [
    ("fp8-dynamic", gpu, with_flashinfer, *chosen)
    for gpu, chosen in FP8.items()
    for with_flashinfer in (True, False)
]


@pytest.fixture
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running platform, as if it were the GPU and the wheel that the test names."""
    gpu, with_flashinfer = request.param
    major, minor, fp4, grouped = GPUS[gpu]

    class Gpu(Platform):
        _enum = PlatformEnum.CUDA
        device_name = device_type = "cuda"
        supported_quantization: list[str] = []  # noqa: RUF012 -- vLLM's declaration

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            del device_id
            return DeviceCapability(major, minor)

        @classmethod
        def supports_fp8(cls) -> bool:
            return True

    # These two are younger than the released checkpoints and no part of what is promised.
    absent = {"has_flashinfer_bf16_fp4", "has_flashinfer_b12x_gemm", "has_flashinfer_b12x_moe"}
    modules = [one for name, one in sys.modules.items() if name.startswith("vllm.")]
    for module in [flashinfer, *modules]:
        for name in [one for one in vars(module) if one.startswith("has_flashinfer")]:
            answer = with_flashinfer and name not in absent
            monkeypatch.setattr(module, name, lambda answer=answer: answer)
    monkeypatch.setattr(ops, "cutlass_scaled_mm_supports_fp4", lambda _: fp4)
    monkeypatch.setattr(nvfp4_utils, "cutlass_scaled_mm_supports_fp4", lambda _: fp4)
    monkeypatch.setattr(ops, "cutlass_scaled_mm_supports_fp8", lambda _: True)
    monkeypatch.setattr(ops, "cutlass_group_gemm_supported", lambda _: grouped)
    # Every module holds this object, so it is its class that changes.
    monkeypatch.setattr(current_platform, "__class__", Gpu)


@pytest.mark.parametrize(
    ("form", "platform", "linear", "experts"),
    [
        pytest.param(form, (gpu, with_flashinfer), linear, experts, id=f"{form}-{gpu}-{word}")
        for form, gpu, with_flashinfer, linear, experts in CASES
        for word in ["flashinfer" if with_flashinfer else "alone"]
    ],
    indirect=["platform"],
)
@pytest.mark.usefixtures("platform")
def test_the_kernels_of_a_gpu(form: Any, linear: str, experts: str) -> None:
    config = mapped(form)
    adopt(config)
    assert type(config) is CompressedTensorsConfig, "on a GPU the configuration is vLLM's own"
    with set_current_vllm_config(served()):
        assert kernel_of(config, "model.layers.0.self_attn.qkv_proj") == linear
        assert kernel_of(config, "model.layers.0.mlp.gate_up_proj") == linear
        method = config.get_quant_method(routed_experts(), "model.layers.0.experts")
    backend = method.nvfp4_backend if form == "nvfp4" else method.fp8_backend
    assert backend.name == experts


@pytest.mark.parametrize("form", ["nvfp4", "fp8-dynamic"])
@pytest.mark.parametrize("platform", [("sm_100", True)], indirect=True)
@pytest.mark.usefixtures("platform")
def test_what_the_files_leave_alone(form: Any) -> None:
    config = mapped(form)
    with set_current_vllm_config(served()):
        for prefix in (
            "self_conditioning.gate_up_proj",
            "self_conditioning.down_proj",
            "embed_vision.embedding_projection",
            "vision_tower.encoder.layers.0.self_attn.q_proj.linear",
        ):
            method = config.get_quant_method(a_linear(), prefix)
            assert isinstance(method, UnquantizedLinearMethod), prefix


def served() -> VllmConfig:
    """A configuration that knows the model's precision."""
    config = VllmConfig()
    object.__setattr__(config, "model_config", SimpleNamespace(dtype=torch.bfloat16))
    return config


def mapped(form: Any) -> CompressedTensorsConfig:
    """A released configuration, as the model class hands it to its layers."""
    kept = (
        "model.decoder.layers.0.router.proj.weight",
        "model.decoder.self_conditioning.gate_proj.weight",
        "model.decoder.self_conditioning.up_proj.weight",
        "model.decoder.self_conditioning.down_proj.weight",
        "model.encoder.embed_vision.embedding_projection.weight",
        "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
    )
    ignore = plain_linears({name: torch.empty(1, 1) for name in kept})
    config = CompressedTensorsConfig.from_config(quantisation_config(form, ignore=ignore))
    model = DiffusionGemmaForBlockDiffusion
    config.apply_vllm_mapper(model.hf_to_vllm_mapper.get_rename_mapper())
    config.packed_modules_mapping = dict(model.packed_modules_mapping)
    return config


def kernel_of(config: CompressedTensorsConfig, prefix: str) -> str:
    """Name of the kernel that a linear layer would run."""
    layer = a_linear()
    config.get_quant_method(layer, prefix)
    scheme = vars(layer)["scheme"]
    if "kernel" not in vars(scheme):  # FP8 chooses when it knows the shape
        chosen = init_fp8_linear_kernel(
            activation_quant_key=scheme.activation_quant_key,
            weight_quant_key=scheme.weight_quant_key,
            input_dtype=torch.bfloat16,
            out_dtype=torch.bfloat16,
            weight_shape=(4096, 2816),
        )
        return type(chosen).__name__
    return type(scheme.kernel).__name__


def a_linear() -> QKVParallelLinear:
    """A layer that only says what it is: building one needs a process group."""
    layer = QKVParallelLinear.__new__(QKVParallelLinear)
    nn.Module.__init__(layer)
    return layer


def routed_experts() -> RoutedExperts:
    """The experts of the released model, without weights."""
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    layer.ckpt_gate_proj_name = "gate_proj"
    layer.ckpt_up_proj_name = "up_proj"
    layer.ckpt_down_proj_name = "down_proj"
    layer.moe_config = FusedMoEConfig(
        num_experts=128,
        experts_per_token=8,
        hidden_dim=2816,
        intermediate_size=704,
        num_local_experts=128,
        num_logical_experts=128,
        activation=MoEActivation.GELU_TANH,
        device="cpu",
        # Gemma 4 routes with a function of its own.
        routing_method=RoutingMethodType.Custom,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    return layer
