"""The configs of model types that Transformers does not know, as those of its own decoders.

LLaDA's config has names of its own for what Llama's has; LLaDA-MoE's differs from Qwen3-MoE's in
few. What a model may not have to be served is checked in ``llada.family``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from vllm_diffusion.models.llada.family import BLOCK

if TYPE_CHECKING:
    from collections.abc import Mapping

_LLAMA_NAMES: Final = {
    "d_model": "hidden_size",
    "mlp_hidden_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "weight_tying": "tie_word_embeddings",
    "activation_type": "hidden_act",
}
"""LLaDA's entry -> Llama's."""

_QWEN_NAMES: Final = {
    "dense_intermediate_size": "intermediate_size",
    "expert_intermediate_size": "moe_intermediate_size",
}
"""LLaDA-MoE's entry -> Qwen3-MoE's."""

_CANVAS: Final = {"canvas_length": "block_size"}


class LLaDAConfig(LlamaConfig):
    """Model type ``llada``; the defaults are what can be served."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {**LlamaConfig.attribute_map, **_CANVAS}

    block_size: int = BLOCK
    mask_token_id: int | None = None
    embedding_size: int | None = None
    block_type: str = "llama"
    layer_norm_type: str = "rms"
    rope: bool = True
    alibi: bool | None = None
    attention_layer_norm: bool | None = None
    input_emb_norm: bool | None = None
    scale_logits: bool | None = None
    include_bias: bool | None = None
    include_qkv_bias: bool | None = None
    bias_for_layer_norm: bool | None = None
    multi_query_attention: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Set Llama's entries."""
        _rename(self, _LLAMA_NAMES, kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """Some checkpoints with experts name the model type of those without."""
        if "LLaDAMoEModelLM" in config_dict.get("architectures", ()):
            return LLaDAMoEConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


class ILLaDAConfig(LlamaConfig):
    """Model type ``illada``; the defaults are what can be served."""

    model_type = "illada"
    attribute_map: ClassVar[dict[str, str]] = {**LlamaConfig.attribute_map, **_CANVAS}

    block_size: int = BLOCK
    mask_token_id: int | None = None
    layer_norm_eps: float | None = None


class LLaDAMoEConfig(Qwen3MoeConfig):
    """Model type ``lladamoe``; the defaults are what can be served."""

    model_type = "lladamoe"
    attribute_map: ClassVar[dict[str, str]] = {**Qwen3MoeConfig.attribute_map, **_CANVAS}

    block_size: int = BLOCK
    mask_token_id: int | None = None
    qk_layernorm: bool = True
    clip_qkv: float | None = None
    partial_rotary_factor: float = 1.0
    moe_router_enable_expert_bias: bool = False
    moe_router_score_function: str = "softmax"
    routed_scaling_factor: float = 1.0
    router_num_group: int | None = None
    # Qwen's backbone reads it where it is there, and takes no None.
    shared_expert_intermediate_size: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        """Set Qwen's entries."""
        _rename(self, _QWEN_NAMES, kwargs)
        layers = kwargs.get("moe_layer_freq") or []
        self.mlp_only_layers = [
            index for index, has_experts in enumerate(layers) if not has_experts
        ]
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """Entries that are null are as good as missing."""
        said = {name: value for name, value in config_dict.items() if value is not None}
        return super().from_dict(said | {"model_type": cls.model_type}, **kwargs)


def _rename(config: PreTrainedConfig, names: Mapping[str, str], said: Mapping[str, Any]) -> None:
    for own, name in names.items():
        if said.get(own) is not None:
            setattr(config, name, said[own])
