"""LLaDA's model classes against Transformers, and what they refuse to load."""

from __future__ import annotations

import json
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.cases import for_each
from helpers.decoders import DenseDecoder, assert_same_logits, decoder_config, loaded_decoder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.family import Text
from vllm_diffusion.models import family_module
from vllm_diffusion.models.llada.family import END_OF_TURN
from vllm_diffusion.models.llada.testing.checkpoint import (
    MASK_ID,
    TinySpec,
    build_model,
    make_tiny_checkpoint,
)
from vllm_diffusion.testing.dense_reveal import dense_logits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.vllm

SPECS = {
    "llada": TinySpec(),
    "illada": TinySpec(kind="illada", kv_heads=2),
    "moe": TinySpec(kind="moe"),
}
MODULE = family_module("LLaDAModelLM")


@pytest.fixture(scope="module", params=SPECS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp(kind), SPECS[kind])


@pytest.fixture(scope="module")
def decoder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DenseDecoder]:
    with loaded_decoder(checkpoint, tmp_path_factory.mktemp("group")) as loaded:
        yield loaded


@pytest.fixture
def said(checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    """`said(alibi=True)`: the config of a checkpoint that says so."""
    content = json.loads((checkpoint / "config.json").read_text())

    def config(**changes: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(content | changes))
        return AutoConfig.from_pretrained(tmp_path)

    return config


def test_logits_are_those_of_transformers(kind: str, decoder: DenseDecoder) -> None:
    truth, dice = build_model(SPECS[kind]), Random(0)
    for length in (1, 9, 37):
        tokens = [dice.randrange(512) for _ in range(length)]
        seen = torch.ones(length, length, dtype=torch.bool)
        assert_same_logits(decoder.logits(tokens, seen), truth, tokens, seen)


def test_a_tied_head_is_the_embedding(kind: str, decoder: DenseDecoder) -> None:
    vocabulary = decoder.model.vocabulary()
    tied = vocabulary.output.data_ptr() == vocabulary.embedding.data_ptr()
    assert tied == (kind == "illada")


def test_renormalised_experts_would_be_another_model() -> None:
    truth = build_model(SPECS["moe"])
    assert truth.config.mlp_only_layers == [0]
    assert not truth.config.norm_topk_prob
    tokens, seen = list(range(20, 30)), torch.ones(10, 10, dtype=torch.bool)
    plain = dense_logits(truth, tokens, seen)
    for layer in truth.model.layers[1:]:
        layer.mlp.gate.norm_topk_prob = True
    assert float((dense_logits(truth, tokens, seen) - plain).abs().max()) > 0.1


def test_what_the_family_declares(kind: str, said: Callable[..., Any]) -> None:
    family = MODULE.declare(said(), {})
    assert (family.text, family.block, family.horizon) == (Text.WHOLE, 32, True)
    assert (family.mask_id, family.banned, family.ends) == (MASK_ID, (MASK_ID,), (2,))
    assert family.published == {"max_steps": 32, "reveal_threshold": 0.0, "reveal_by": "model"}
    released = said(vocab_size=157184, embedding_size=157184, mask_token_id=3)
    wanted = (2, END_OF_TURN) if kind == "llada" else (2,)
    declared = MODULE.declare(released, {})
    assert (declared.ends, declared.unlisted_ends) == (wanted, wanted[1:])
    assert MODULE.declare(said(block_size=64), {}).published["max_steps"] == 64


def test_published_masks(kind: str, said: Callable[..., Any]) -> None:
    unnamed = said(vocab_size=157184, embedding_size=157184, mask_token_id=None)
    if kind == "llada":
        with pytest.raises(CheckpointError, match=r"no mask_token_id.*--hf-overrides"):
            MODULE.declare(unnamed, {})
    else:
        assert MODULE.declare(unnamed, {}).mask_id == {"illada": 5, "moe": 156895}[kind]
        with pytest.raises(CheckpointError, match="mask_token_id is 600, but"):
            MODULE.declare(said(mask_token_id=600), {})


REFUSED = {
    "llada": [
        {"alibi": True},
        {"attention_layer_norm": True},
        {"scale_logits": True},
        {"input_emb_norm": True},
        {"block_type": "sequential"},
        {"layer_norm_type": "default"},
        {"include_qkv_bias": True},
        {"embedding_size": 640},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    "illada": [
        {"layer_norm_eps": 1e-5},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
    "moe": [
        {"qk_layernorm": False},
        {"shared_expert_intermediate_size": 64},
        {"moe_router_enable_expert_bias": True},
        {"moe_router_score_function": "sigmoid"},
        {"routed_scaling_factor": 2.5},
        {"attention_bias": True},
    ],
}


def test_what_is_no_such_model(kind: str, said: Callable[..., Any]) -> None:
    for changes in REFUSED[kind]:
        [name] = changes
        word = "rotary embedding is scaled" if name == "rope_scaling" else name
        with pytest.raises(CheckpointError, match=word):
            MODULE.declare(said(**changes), {})


def test_experts_under_the_model_type_of_those_without(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, SPECS["moe"])
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"model_type": "llada"}))
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "lladamoe"
    assert config.mlp_only_layers == [0]


@for_each(trust=[False, True])
def test_the_config_is_ours_whatever_remote_code_it_names(checkpoint: Path, trust: bool) -> None:
    from vllm.transformers_utils.config import get_config

    config = get_config(checkpoint, trust_remote_code=trust)
    assert type(config).__module__ == "vllm_diffusion.models.llada.config"
    assert (config.hidden_size, config.num_hidden_layers) == (128, 3)
    assert config.max_position_embeddings == 1024


def test_a_canvas_is_a_block(checkpoint: Path) -> None:
    assert decoder_config(checkpoint).diffusion_config.canvas_length == 32
    for how in ({"hf_overrides": {"block_size": 64}}, {"diffusion_config": {"canvas_length": 64}}):
        assert decoder_config(checkpoint, **how).diffusion_config.canvas_length == 64


def test_answers_are_greedy_unless_somebody_says_otherwise(checkpoint: Path) -> None:
    def default(**options: Any) -> Any:
        model = decoder_config(checkpoint, **options).model_config
        return model.get_diff_sampling_param().get("temperature")

    assert default() == 0.0
    assert default(generation_config="vllm") == 0.0
    assert default(override_generation_config={"temperature": 0.3}) == 0.3


def test_a_missing_weight_is_named_as_the_backbone_has_it(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "made")
    weights = load_file(folder / "model.safetensors")
    del weights["model.transformer.blocks.1.ff_out.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    lacks = r"lacks model\.layers\.1\.mlp\.down_proj\.weight:"
    with pytest.raises(CheckpointError, match=lacks), loaded_decoder(folder, tmp_path):
        pass
