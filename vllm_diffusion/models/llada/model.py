"""LLaDA for vLLM: its Llama decoder, and its Qwen3 decoder with experts."""

from __future__ import annotations

import re
from typing import Final

from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.qwen3_moe import Qwen3MoeModel
from vllm.model_executor.models.utils import WeightsMapper

from vllm_diffusion.models.decoder.model import CanvasDecoder

_OUTSIDE: Final = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
_LAYER: Final = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
"""LLaDA's names -> Llama's, outside the layers and inside; ``ff_out`` is one thing in each."""

RENAMES: Final = WeightsMapper(
    orig_to_new_regex={
        **{
            re.compile(rf"^model\.transformer\.{own}(?=\.|$)"): name
            for own, name in _OUTSIDE.items()
        },
        **{
            re.compile(rf"^model\.transformer\.blocks\.(\d+)\.{own}(?=\.|$)"): (
                rf"model.layers.\1.{name}"
            )
            for own, name in _LAYER.items()
        },
    }
)


class LLaDAModelLM(CanvasDecoder, SupportsQuant):
    """The model class vLLM loads for ``LLaDAModelLM`` checkpoints: LLaDA and LLaDA-1.5."""

    backbone = LlamaModel
    renames = hf_to_vllm_mapper = RENAMES


class ILLaDAForCausalLM(CanvasDecoder, SupportsQuant):
    """The model class vLLM loads for ``ILLaDAForCausalLM`` checkpoints, with Llama's names."""

    backbone = LlamaModel


class LLaDAMoEModelLM(CanvasDecoder, SupportsQuant):
    """The model class vLLM loads for ``LLaDAMoEModelLM`` checkpoints, with Qwen's names."""

    backbone = Qwen3MoeModel
