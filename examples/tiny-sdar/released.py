"""The models, and the files of their checkpoints in the names of the families' released ones."""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from noising import BLOCK, Text
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from vllm_diffusion.models.llada.config import LLaDAConfig
from vllm_diffusion.models.llada.testing import checkpoint as llada
from vllm_diffusion.models.sdar.config import SDARConfig
from vllm_diffusion.models.sdar.testing import checkpoint as sdar
from vllm_diffusion.testing.json_file import write_json
from vllm_diffusion.testing.saved_decoder import save_decoder

TOKENIZER = Path(__file__).parents[1] / "tiny-diffusiongemma"
"""Whose tokenizer and chat template these models have as well, with a mask."""

MASK, END = "<|mask|>", "<turn|>"

SIZES: dict[str, Any] = {
    "hidden": 128,
    "layers": 4,
    "heads": 4,
    "intermediate": 320,
    # The tokenizer's, its mask, and some that no text has.
    "vocab": 648,
    "max_positions": 4096,
    "dtype": "bfloat16",
}
SPECS: dict[str, Any] = {
    "sdar": sdar.TinySpec(**SIZES, block=BLOCK, kv_heads=2, head_dim=32),
    "llada": llada.TinySpec(**SIZES, kv_heads=4),
}
MAKERS: dict[str, Any] = {"sdar": sdar, "llada": llada}
CLASSES: dict[str, Any] = {
    "sdar": (Qwen3ForCausalLM, SDARConfig),
    "llada": (LlamaForCausalLM, LLaDAConfig),
}
ROPE_THETA = 10000.0
"""Of texts that are hundreds of tokens long, not thousands."""


def build_text() -> Text:
    """Tokenizer with a mask as its last token."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
    return Text(tokenizer, tokenizer.token_to_id(MASK), tokenizer.token_to_id(END))


def build_model(family: str, text: Text, seed: int = 0) -> Any:
    """Fresh model of Transformers, fp32, that computes what the family's own code does."""
    torch.manual_seed(seed)
    kind, config = CLASSES[family]
    return kind(config.from_dict(config_of(family, text))).float()


def load_model(family: str, folder: Path) -> Any:
    """Model of a checkpoint that `save_checkpoint` wrote, in fp32."""
    kind, config = CLASSES[family]
    released = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model, saved = kind(config.from_dict(released)), load_file(folder / "model.safetensors")
    model.load_state_dict({n: saved[name_of(family, n)] for n in model.state_dict()})
    return model.float().eval()


def save_checkpoint(family: str, model: Any, text: Text, folder: Path) -> None:
    """Write weights in bf16, configurations and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_decoder(folder, model, config_of(family, text), renamed=lambda name: name_of(family, name))
    write_json(
        folder / "generation_config.json",
        # Greedy where a request does not say otherwise.
        {"eos_token_id": [1, text.end], "pad_token_id": 0, "temperature": 0.0},
    )
    text.tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(TOKENIZER / "chat_template.jinja", folder)
    write_json(folder / "tokenizer_config.json", tokenizer_config())


def name_of(family: str, name: str) -> str:
    """What a family's files call a weight of Transformers' decoder."""
    return llada.own_name(name) if family == "llada" else name


def config_of(family: str, text: Text) -> dict[str, Any]:
    """`config.json` of a released checkpoint, with the sizes and ids of this one."""
    config: dict[str, Any] = MAKERS[family].released_config(SPECS[family])
    config.pop("auto_map", None)  # names code that is not in the folder
    return config | {
        "bos_token_id": 2,
        "eos_token_id": text.end,
        "mask_token_id": text.mask,
        "pad_token_id": 0,
        "rope_theta": ROPE_THETA,
    }


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
