"""A complete DiffusionGemma checkpoint with random weights.

Takes a `TinySpec`. Gives a directory that Transformers and vLLM load like the released model: text
and vision towers, MoE, sliding and full layers, tokenizer, chat template, processor files,
generation constants. Never downloads; the same spec gives the same bytes.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, get_args

from tokenizers import Tokenizer

from vllm_diffusion.models.diffusion_gemma.testing import tokenizer as tokens
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import token_id, write_processor_files
from vllm_diffusion.testing.json_file import write_json

Dtype = Literal["float32", "bfloat16", "float16"]

SUPPORTED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's CPU attention kernel is compiled for."""

VISION_PATCH = 16
VISION_POOLING = 3

FULL_ATTENTION_EVERY = 6
"""Five sliding layers, then one full layer; the last layer is always full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinySpec:
    """Sizes of the checkpoint; every field is also an option of `testing.tiny_checkpoint`."""

    seed: int = 0
    canvas: int = 32
    hidden: int = 64
    layers: int = 3
    vocab: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    full_kv_heads: int = 1
    full_head_dim: int = 64
    intermediate: int = 128
    experts: int = 4
    experts_per_token: int = 2
    expert_intermediate: int = 64
    sliding_window: int = 32
    max_positions: int = 4096
    vision_hidden: int = 32
    vision_layers: int = 1
    soft_tokens: int = 70
    bidirectional_images: bool = True
    dtype: Dtype = "float32"
    max_steps: int = 48
    perturb: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError naming every field that cannot work."""
        problems = [
            f"{field.name} must be positive, but got {getattr(self, field.name)}"
            for field in fields(self)
            if field.type == "int" or field.type is int
            if field.name != "seed" and getattr(self, field.name) < 1
        ]
        problems += [
            f"{name} must be one of {SUPPORTED_HEAD_DIMS}, but got {dim}"
            for name, dim in (("head_dim", self.head_dim), ("full_head_dim", self.full_head_dim))
            if dim not in SUPPORTED_HEAD_DIMS
        ]
        problems += [
            f"heads ({self.heads}) must be a multiple of {name} ({kv})"
            for name, kv in (("kv_heads", self.kv_heads), ("full_kv_heads", self.full_kv_heads))
            if kv > 0 and self.heads % kv
        ]
        if self.vocab < tokens.MIN_VOCAB:
            problems.append(f"vocab must be at least {tokens.MIN_VOCAB}, got {self.vocab}")
        if self.experts_per_token > self.experts:
            problems.append(
                f"experts_per_token ({self.experts_per_token}) exceeds experts ({self.experts})"
            )
        if self.dtype not in get_args(Dtype):
            problems.append(f"dtype must be one of {get_args(Dtype)}, but got {self.dtype!r}")
        if problems:
            raise ValueError("Cannot make this checkpoint: " + "; ".join(problems) + ".")

    @property
    def layer_types(self) -> list[str]:
        """Attention kind of every layer, in order."""
        return [
            "full_attention"
            if layer % FULL_ATTENTION_EVERY == 0 or layer == self.layers
            else "sliding_attention"
            for layer in range(1, self.layers + 1)
        ]


# The released model's text part, but for its depth: one full layer behind five sliding ones is
# every kind of layer it has, and layers of a kind launch the same kernels.
RELEASED: Final = TinySpec(
    canvas=256,
    hidden=2816,
    layers=6,
    vocab=262144,
    heads=16,
    kv_heads=8,
    head_dim=256,
    full_kv_heads=2,
    full_head_dim=512,
    intermediate=2112,
    experts=128,
    experts_per_token=8,
    expert_intermediate=704,
    sliding_window=1024,
    max_positions=262144,
    dtype="bfloat16",
)


def make_tiny_checkpoint(path: str | Path, spec: TinySpec | None = None) -> Path:
    """Write the checkpoint into `path`, made if missing, and return it.

    Files of an earlier checkpoint in `path` are overwritten. Leaves torch's global random state as
    it was. Takes about two seconds at the default size, and needs Transformers but no vLLM.
    """
    from vllm_diffusion.models.diffusion_gemma.testing.weights import randomise

    spec = spec or TinySpec()
    model = build_model(spec)
    if spec.perturb:
        randomise(model, seed=spec.seed)
    return save_checkpoint(path, spec, model, tokens.build_tokenizer(spec.vocab))


def make_weightless_checkpoint(path: str | Path, spec: TinySpec | None = None) -> Path:
    """Write what `make_tiny_checkpoint` writes but for the weights, and return `path`.

    For `load_format="dummy"`, under which vLLM draws the weights where they will be: a model of the
    released widths is then a few small files.
    """
    spec, directory = spec or TinySpec(), Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    config = _config(spec)
    config.architectures = ["DiffusionGemmaForBlockDiffusion"]
    config.dtype = spec.dtype
    config.save_pretrained(directory)
    _write_beside_weights(directory, spec, tokens.build_tokenizer(spec.vocab))
    return directory


def build_model(spec: TinySpec) -> Any:
    """Return a `DiffusionGemmaForBlockDiffusion` in fp32 with Transformers' initial values."""
    import torch
    from transformers import DiffusionGemmaForBlockDiffusion

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return DiffusionGemmaForBlockDiffusion(_config(spec)).float()


def save_checkpoint(
    path: str | Path,
    spec: TinySpec,
    model: Any,
    tokenizer: Tokenizer,
) -> Path:
    """Write a model of this spec, in the spec's dtype, with all files that serving it needs."""
    import torch

    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    with _quiet():
        model.to(dtype).save_pretrained(directory)
    _write_beside_weights(directory, spec, tokenizer)
    return directory


def _write_beside_weights(directory: Path, spec: TinySpec, tokenizer: Tokenizer) -> None:
    # Overwrites the one saved with a model, which holds nulls: a released one states its constants.
    write_json(directory / "generation_config.json", _generation_config(spec))
    write_processor_files(
        directory,
        tokenizer=tokenizer,
        soft_tokens=spec.soft_tokens,
        patch=VISION_PATCH,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Transformers from drawing a progress bar for a file of two megabytes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _config(spec: TinySpec) -> Any:
    from transformers import DiffusionGemmaConfig, DiffusionGemmaTextConfig, Gemma4VisionConfig

    text = DiffusionGemmaTextConfig(
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        global_head_dim=spec.full_head_dim,
        num_global_key_value_heads=spec.full_kv_heads,
        sliding_window=spec.sliding_window,
        layer_types=spec.layer_types,
        num_experts=spec.experts,
        top_k_experts=spec.experts_per_token,
        moe_intermediate_size=spec.expert_intermediate,
        max_position_embeddings=spec.max_positions,
        use_bidirectional_attention="vision" if spec.bidirectional_images else None,
        pad_token_id=token_id(tokens.PAD),
        eos_token_id=token_id(tokens.EOS),
        bos_token_id=token_id(tokens.BOS),
    )
    vision = Gemma4VisionConfig(
        hidden_size=spec.vision_hidden,
        intermediate_size=2 * spec.vision_hidden,
        num_hidden_layers=spec.vision_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=spec.vision_hidden // 2,
        patch_size=VISION_PATCH,
        pooling_kernel_size=VISION_POOLING,
        # The longest side an image can get: all its soft tokens in one row.
        position_embedding_size=spec.soft_tokens * VISION_POOLING,
        default_output_length=spec.soft_tokens,
        standardize=True,
    )
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=spec.canvas,
        image_token_id=token_id(tokens.IMAGE),
        boi_token_id=token_id(tokens.IMAGE_START),
        eoi_token_id=token_id(tokens.IMAGE_END),
    )


def _generation_config(spec: TinySpec) -> dict[str, Any]:
    """Return the released constants; only the step limit follows the spec."""
    return {
        "max_new_tokens": 256,
        "max_denoising_steps": spec.max_steps,
        "t_min": 0.4,
        "t_max": 0.8,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "eos_token_id": [token_id(tokens.EOS), token_id(tokens.TURN_END)],
        "pad_token_id": token_id(tokens.PAD),
        "bos_token_id": token_id(tokens.BOS),
    }
