"""A complete SDAR checkpoint with random weights, dense or with experts.

Takes a `TinySpec`. Gives a directory with the files and names of a released one: config with its
remote code named, generation config, weights by Qwen3's names, tokenizer and chat template. Never
downloads; the same spec gives the same bytes.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_diffusion.testing.json_file import write_json
from vllm_diffusion.testing.lively_weights import randomise
from vllm_diffusion.testing.plain_tokenizer import write_tokenizer
from vllm_diffusion.testing.saved_decoder import save_decoder

Dtype = Literal["float32", "bfloat16", "float16"]

END_OF_TEXT, TURN_START, TURN_END, MASK = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, MASK)
"""In id order."""

MASK_ID = SPECIAL_TOKENS.index(MASK)

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySpec:
    """Sizes of the checkpoint; every field is also an option of `testing.tiny_checkpoint`."""

    seed: int = 0
    block: int = 4
    hidden: int = 64
    layers: int = 3
    vocab: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 128
    experts: int = 0
    """Of a layer; 0 for a dense model."""
    experts_per_token: int = 2
    expert_intermediate: int = 64
    max_positions: int = 4096
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raise ValueError naming every field that cannot work."""
        problems = [
            f"{field.name} must be positive, but got {getattr(self, field.name)}"
            for field in fields(self)
            if field.type is int and field.name not in {"seed", "experts"}
            if getattr(self, field.name) < 1
        ]
        if self.experts < 0 or 0 < self.experts < self.experts_per_token:
            problems.append(
                f"experts must be 0 or at least experts_per_token ({self.experts_per_token}), but "
                f"got {self.experts}"
            )
        if self.dtype not in get_args(Dtype):
            problems.append(f"dtype must be one of {get_args(Dtype)}, but got {self.dtype!r}")
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
        roles={"eos_token": TURN_END, "pad_token": END_OF_TEXT},
        chat_template=CHAT_TEMPLATE,
    )
    save_decoder(directory, build_model(spec), released_config(spec))
    write_json(
        directory / "generation_config.json",
        {
            "eos_token_id": [token_id(TURN_END), token_id(END_OF_TEXT)],
            "pad_token_id": token_id(END_OF_TEXT),
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    )
    return directory


def token_id(token: str) -> int:
    """Id of a special token; ValueError for any other string."""
    return SPECIAL_TOKENS.index(token)


def build_model(spec: TinySpec) -> Any:
    """Qwen3 with the spec's weights, in fp32."""
    import torch
    from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

    from vllm_diffusion.models.sdar.config import SDARConfig, SDARMoeConfig

    kind, config = (
        (Qwen3MoeForCausalLM, SDARMoeConfig) if spec.experts else (Qwen3ForCausalLM, SDARConfig)
    )
    with torch.random.fork_rng(devices=[]):
        model = kind(config.from_dict(released_config(spec))).float()
    # The mask may be the most likely token: nobody is to say it all the same.
    never = [index for index in range(len(SPECIAL_TOKENS)) if index != MASK_ID]
    randomise(model, seed=spec.seed, never=never)
    return model.eval()


def released_config(spec: TinySpec) -> dict[str, Any]:
    """`config.json`, with the entries and in the spelling of the released ones."""
    name = "sdar_moe" if spec.experts else "sdar"
    stem = "SDARMoe" if spec.experts else "SDAR"
    experts = {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": spec.expert_intermediate,
        "norm_topk_prob": True,
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.experts_per_token,
    }
    return {
        "architectures": [f"{stem}ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": f"configuration_{name}.{stem}Config",
            "AutoModelForCausalLM": f"modeling_{name}.{stem}ForCausalLM",
        },
        "block_size": spec.block,
        "bos_token_id": token_id(END_OF_TEXT),
        "eos_token_id": token_id(END_OF_TEXT),
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "initializer_range": 0.02,
        "intermediate_size": spec.intermediate,
        "mask_token_id": MASK_ID,
        "max_position_embeddings": spec.max_positions,
        "max_window_layers": spec.layers,
        "model_type": name,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "pad_token_id": token_id(END_OF_TEXT),
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": spec.dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": spec.vocab,
        **(experts if spec.experts else {}),
    }
