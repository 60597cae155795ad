"""A complete checkpoint with random weights of LLaDA, of iLLaDA or of LLaDA-MoE.

Takes a `TinySpec`. Gives a directory with the files and names of a released one: config with its
remote code named, weights, tokenizer and chat template. Never downloads; the same spec gives the
same bytes.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from vllm_diffusion.testing.lively_weights import randomise
from vllm_diffusion.testing.plain_tokenizer import write_tokenizer
from vllm_diffusion.testing.saved_decoder import save_decoder

Dtype = Literal["float32", "bfloat16", "float16"]
Kind = Literal["llada", "illada", "moe"]

BOS, EOS, MASK, TURN_END = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, "<|pad|>", EOS, "<|start_header_id|>", "<|end_header_id|>", MASK, TURN_END)
"""In id order; the first six are where iLLaDA has them."""

MASK_ID = SPECIAL_TOKENS.index(MASK)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

_OUTSIDE: Final = {
    "model.embed_tokens.weight": "model.transformer.wte.weight",
    "model.norm.weight": "model.transformer.ln_f.weight",
    "lm_head.weight": "model.transformer.ff_out.weight",
}
_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySpec:
    """Sizes of the checkpoint; every field is also an option of `testing.tiny_checkpoint`."""

    kind: Kind = "llada"
    seed: int = 0
    hidden: int = 128
    layers: int = 3
    vocab: int = 512
    heads: int = 4
    kv_heads: int = 4
    intermediate: int = 128
    experts: int = 8
    """Of a layer of the kind `moe`, whose first layer is dense."""
    experts_per_token: int = 2
    expert_intermediate: int = 64
    max_positions: int = 1024
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raise ValueError naming every field that cannot work."""
        problems = [
            f"{field.name} must be positive, but got {getattr(self, field.name)}"
            for field in fields(self)
            if field.type is int and field.name != "seed" and getattr(self, field.name) < 1
        ]
        problems += [
            f"{name} must be one of {get_args(kinds)}, but got {value!r}"
            for name, value, kinds in (("kind", self.kind, Kind), ("dtype", self.dtype, Dtype))
            if value not in get_args(kinds)
        ]
        if self.heads > 0 and self.hidden % self.heads:
            problems.append(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        if self.experts_per_token > self.experts:
            problems.append(
                f"experts_per_token ({self.experts_per_token}) exceeds experts ({self.experts})"
            )
        if problems:
            raise ValueError("Cannot make this checkpoint: " + "; ".join(problems) + ".")


def make_tiny_checkpoint(path: str | Path, spec: TinySpec | None = None) -> Path:
    """Write the checkpoint into `path`, made if missing, and return it.

    Files of an earlier checkpoint in `path` are overwritten. Leaves torch's global random state as
    it was. Needs Transformers but no vLLM.
    """
    spec, directory = spec or TinySpec(), Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(
        directory,
        vocab=spec.vocab,
        special_tokens=SPECIAL_TOKENS,
        roles={"bos_token": BOS, "eos_token": EOS, "pad_token": EOS},
        chat_template=CHAT_TEMPLATE,
    )
    renamed = own_name if spec.kind == "llada" else str
    save_decoder(directory, build_model(spec), released_config(spec), renamed=renamed)
    return directory


def token_id(token: str) -> int:
    """Id of a special token; ValueError for any other string."""
    return SPECIAL_TOKENS.index(token)


def build_model(spec: TinySpec) -> Any:
    """Llama, or Qwen3 with experts, with the spec's weights, in fp32."""
    import torch
    from transformers import LlamaForCausalLM, Qwen3MoeForCausalLM

    from vllm_diffusion.models.llada.config import ILLaDAConfig, LLaDAConfig, LLaDAMoEConfig

    made: dict[str, tuple[Any, Any]] = {
        "llada": (LlamaForCausalLM, LLaDAConfig),
        "illada": (LlamaForCausalLM, ILLaDAConfig),
        "moe": (Qwen3MoeForCausalLM, LLaDAMoEConfig),
    }
    kind, config = made[spec.kind]
    with torch.random.fork_rng(devices=[]):
        model = kind(config.from_dict(released_config(spec))).float()
    # The mask may be the most likely token: nobody is to say it all the same.
    never = [index for index in range(len(SPECIAL_TOKENS)) if index != MASK_ID]
    randomise(model, seed=spec.seed, never=never)
    return model.eval()


def own_name(name: str) -> str:
    """LLaDA's name of one of Llama's weights."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"model.transformer.blocks.{layer}.{_LAYER[module]}.{kind}"


def released_config(spec: TinySpec) -> dict[str, Any]:
    """`config.json`, with the entries and in the spelling of the released ones."""
    return {"llada": _llada, "illada": _illada, "moe": _moe}[spec.kind](spec)


def _llada(spec: TinySpec) -> dict[str, Any]:
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": spec.hidden,
        "embedding_dropout": 0.0,
        "embedding_size": spec.vocab,
        "eos_token_id": token_id(EOS),
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": spec.max_positions,
        "mlp_hidden_size": spec.intermediate,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": spec.heads,
        "n_kv_heads": spec.kv_heads,
        "n_layers": spec.layers,
        "pad_token_id": token_id(EOS),
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": spec.dtype,
        "use_cache": False,
        "vocab_size": spec.vocab,
        "weight_tying": False,
    }


def _illada(spec: TinySpec) -> dict[str, Any]:
    return {
        **_plain(spec),
        "architectures": ["ILLaDAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModel": "modeling_illada.ILLaDAForCausalLM",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        "bos_token_id": token_id(BOS),
        "intermediate_size": spec.intermediate,
        "layer_norm_eps": None,
        "mlp_bias": False,
        "model_type": "illada",
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }


def _moe(spec: TinySpec) -> dict[str, Any]:
    return {
        **_plain(spec),
        "architectures": ["LLaDAMoEModelLM"],
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "clip_qkv": None,
        "dense_intermediate_size": spec.intermediate,
        "expert_intermediate_size": spec.expert_intermediate,
        "mask_token_id": MASK_ID,
        "model_type": "lladamoe",
        "moe_layer_freq": [int(index > 0) for index in range(spec.layers)],
        "norm_topk_prob": None,
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.experts_per_token,
        "qk_layernorm": True,
        "rope_theta": 50000,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
    }


def _plain(spec: TinySpec) -> dict[str, Any]:
    """Entries that are called as in any other decoder's config."""
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": token_id(EOS),
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initializer_range": 0.02,
        "max_position_embeddings": spec.max_positions,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "pad_token_id": token_id(EOS),
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "torch_dtype": spec.dtype,
        "use_cache": False,
        "vocab_size": spec.vocab,
    }
