"""SDAR's model class against Transformers, and what it refuses to load."""

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
from vllm_diffusion.models.sdar.testing.checkpoint import (
    MASK_ID,
    TinySpec,
    build_model,
    make_tiny_checkpoint,
)
from vllm_diffusion.models.sdar.testing.reference import visible

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.vllm

SPECS = {"dense": TinySpec(), "experts": TinySpec(experts=8)}
ARCHITECTURES = {"dense": "SDARForCausalLM", "experts": "SDARMoeForCausalLM"}


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


def test_logits_are_those_of_transformers(kind: str, decoder: DenseDecoder) -> None:
    truth, dice = build_model(SPECS[kind]), Random(0)
    for length, block in ((1, 4), (9, 4), (37, 16)):
        tokens = [dice.randrange(512) for _ in range(length)]
        seen = visible(length, block)
        assert_same_logits(decoder.logits(tokens, seen), truth, tokens, seen)


def test_the_head_may_stream(decoder: DenseDecoder) -> None:
    vocabulary = decoder.model.vocabulary()
    assert (vocabulary.size, len(vocabulary), vocabulary.softcap) == (512, 512, None)
    assert vocabulary.output is not vocabulary.embedding, "the head is not tied"
    assert vocabulary.loads() == 1


def test_the_sampler_takes_hidden_rows(decoder: DenseDecoder) -> None:
    rows = torch.randn(2, 64)
    decoder.model.sampler_takes_hidden = True
    assert decoder.model.compute_logits(rows) is rows
    decoder.model.sampler_takes_hidden = False
    with torch.inference_mode():
        assert decoder.model.compute_logits(rows).shape == (2, 512)


def test_what_the_family_declares(kind: str, checkpoint: Path) -> None:
    module = family_module(ARCHITECTURES[kind])
    config = AutoConfig.from_pretrained(checkpoint)
    family = module.declare(config, {"eos_token_id": [2, 0]})
    assert (family.text, family.block, family.mask_id) == (Text.BLOCK, 4, MASK_ID)
    assert (family.banned, family.ends) == ((MASK_ID,), (2, 0))
    assert family.published == {"max_steps": 4, "reveal_threshold": 0.85, "reveal_by": "drawn"}
    assert module.declare(config, {}).ends == (0,)


@for_each(trust=[False, True])
def test_the_config_is_ours_whatever_remote_code_it_names(checkpoint: Path, trust: bool) -> None:
    from vllm.transformers_utils.config import get_config

    config = get_config(checkpoint, trust_remote_code=trust, hf_overrides_kw={"block_size": 2})
    assert type(config).__module__ == "vllm_diffusion.models.sdar.config"
    assert config.canvas_length == 2, "what the user overrides is what vLLM sees"
    assert config.rope_parameters["rope_theta"] == 1e6


def test_a_canvas_is_a_block(checkpoint: Path) -> None:
    config = decoder_config(checkpoint)
    assert config.model_config.is_diffusion
    assert config.diffusion_config.canvas_length == 4
    assert config.attention_config.use_non_causal


def test_a_checkpoint_that_does_not_say_enough(kind: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path, SPECS[kind])
    module = family_module(ARCHITECTURES[kind])
    content = json.loads((folder / "config.json").read_text())

    def said(**changes: Any) -> Any:
        kept = {name: value for name, value in (content | changes).items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        return AutoConfig.from_pretrained(folder)

    with pytest.raises(CheckpointError, match=r"no mask_token_id.*--hf-overrides"):
        module.declare(said(mask_token_id=None), {})
    with pytest.raises(CheckpointError, match=r"mask_token_id is 512, but .* has 512 ids"):
        module.declare(said(mask_token_id=512), {})
    with pytest.raises(CheckpointError, match=r"no block_size.*--hf-overrides"):
        module.declare(said(block_size=None), {})
    with pytest.raises(ValueError, match=r"no block_size.*--hf-overrides"):  # pydantic wraps it
        decoder_config(folder)
    overrides = {"block_size": 8}
    assert decoder_config(folder, hf_overrides=overrides).diffusion_config.canvas_length == 8


def test_a_missing_weight_is_named(kind: str, tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "made", SPECS[kind])
    weights = load_file(folder / "model.safetensors")
    part = "experts.3.up_proj" if kind == "experts" else "up_proj"
    for name in (f"model.layers.1.mlp.{part}.weight", "model.layers.0.self_attn.k_norm.weight"):
        left = {each: weight for each, weight in weights.items() if each != name}
        save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
        with (
            pytest.raises(CheckpointError, match=f"lacks {name}"),
            loaded_decoder(folder, tmp_path),
        ):
            pass
        (tmp_path / "store").unlink(missing_ok=True)
