"""SDAR for vLLM: its Qwen3 decoders, dense and with experts."""

from __future__ import annotations

from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel

from vllm_diffusion.models.decoder.model import CanvasDecoder


class SDARForCausalLM(CanvasDecoder, SupportsQuant):
    """The model class vLLM loads for ``SDARForCausalLM`` checkpoints, TraDo's too."""

    backbone = Qwen3Model


class SDARMoeForCausalLM(CanvasDecoder, SupportsQuant):
    """The model class vLLM loads for ``SDARMoeForCausalLM`` checkpoints."""

    backbone = Qwen3MoeModel
