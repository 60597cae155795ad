"""The files of a checkpoint, in the names that the families' released ones have."""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from noising import BLOCK, Text
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vllm_diffusion.testing.json_file import write_json

EXAMPLES = Path(__file__).parents[1]
TOKENIZER = EXAMPLES / "tiny-diffusiongemma"
"""Whose tokenizer and chat template these models have as well, with a mask."""

MASK, END = "<|mask|>", "<turn|>"
VOCAB = 648
"""Ids of the embedding: those of the tokenizer, its mask, and some that no text has."""

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}

LLADA_NAMES = (
    (r"^model\.embed_tokens\.", "model.transformer.wte."),
    (r"^model\.norm\.", "model.transformer.ln_f."),
    (r"^lm_head\.", "model.transformer.ff_out."),
    (r"^model\.layers\.(\d+)\.", r"model.transformer.blocks.\1."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ff_norm."),
    (r"\.self_attn\.o_proj\.", ".attn_out."),
    (r"\.self_attn\.", "."),
    (r"\.mlp\.gate_proj\.", ".ff_proj."),
    (r"\.mlp\.up_proj\.", ".up_proj."),
    (r"\.mlp\.down_proj\.", ".ff_out."),
)
"""Names of a Llama's weights, and what LLaDA's modelling code calls them; applied in turn."""


def build_text() -> Text:
    """Tokenizer with a mask as its last token."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
    return Text(tokenizer, tokenizer.token_to_id(MASK), tokenizer.token_to_id(END))


def build_model(family: str, seed: int = 0) -> Any:
    """Fresh model of Transformers, fp32, that computes what the family's own code does."""
    torch.manual_seed(seed)
    if family == "sdar":
        return Qwen3ForCausalLM(
            Qwen3Config(**SHAPE, head_dim=32, num_key_value_heads=2, rms_norm_eps=1e-6)
        )
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=4, rms_norm_eps=1e-5))


def llada_name(name: str) -> str:
    """What LLaDA calls a Llama's weight."""
    for pattern, replacement in LLADA_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def load_model(family: str, folder: Path) -> Any:
    """Model of a checkpoint that `save_checkpoint` wrote, in fp32."""
    model = build_model(family)
    saved = load_file(folder / "model.safetensors")
    named = {name: llada_name(name) if family == "llada" else name for name in model.state_dict()}
    model.load_state_dict({name: saved[own].float() for name, own in named.items()})
    return model.eval()


def save_checkpoint(family: str, model: Any, text: Text, folder: Path) -> None:
    """Write weights in bf16, configurations and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = copy.deepcopy(model.state_dict())
    rename = llada_name if family == "llada" else str
    save_file(
        {rename(name): weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(folder / "config.json", CONFIGS[family](model.config, text))
    write_json(folder / "generation_config.json", generation(text))
    text.tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(TOKENIZER / "chat_template.jinja", folder)
    write_json(folder / "tokenizer_config.json", tokenizer_config())


def sdar_config(own: Any, text: Text) -> dict[str, Any]:
    """The fields of a released SDAR."""
    return {
        "architectures": ["SDARForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": BLOCK,
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "eos_token_id": 1,
        "head_dim": own.head_dim,
        "hidden_act": "silu",
        "hidden_size": own.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": own.intermediate_size,
        "mask_token_id": text.mask,
        "max_position_embeddings": own.max_position_embeddings,
        "max_window_layers": own.num_hidden_layers,
        "model_type": "sdar",
        "num_attention_heads": own.num_attention_heads,
        "num_hidden_layers": own.num_hidden_layers,
        "num_key_value_heads": own.num_key_value_heads,
        "pad_token_id": 0,
        "rms_norm_eps": own.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": own.rope_parameters["rope_theta"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": own.vocab_size,
    }


def llada_config(own: Any, text: Text) -> dict[str, Any]:
    """The fields of a released LLaDA."""
    return {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": own.hidden_size,
        "dtype": "bfloat16",
        "embedding_dropout": 0.0,
        "embedding_size": own.vocab_size,
        "eos_token_id": text.end,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": text.mask,
        "max_sequence_length": own.max_position_embeddings,
        "mlp_hidden_size": own.intermediate_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "n_heads": own.num_attention_heads,
        "n_kv_heads": own.num_key_value_heads,
        "n_layers": own.num_hidden_layers,
        "pad_token_id": text.end,
        "residual_dropout": 0.0,
        "rms_norm_eps": own.rms_norm_eps,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": own.rope_parameters["rope_theta"],
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": own.vocab_size,
        "weight_tying": False,
    }


CONFIGS = {"sdar": sdar_config, "llada": llada_config}


def generation(text: Text) -> dict[str, Any]:
    """Where a turn ends; nothing of sampling, so that the default is greedy."""
    return {"bos_token_id": 2, "eos_token_id": [1, text.end], "pad_token_id": 0}


def tokenizer_config() -> dict[str, Any]:
    """That of the tokenizer it is taken from, without the parts of images and sound."""
    released = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    kept = ("backend", "model_max_length", "padding_side", "tokenizer_class")
    tokens = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        **{name: released[name] for name in (*kept, *tokens)},
        "mask_token": MASK,
        "extra_special_tokens": [*released["extra_special_tokens"], MASK],
    }
