"""The random checkpoints of SDAR and LLaDA: complete, lively, and the same bytes every time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vllm_diffusion.models.llada.testing import checkpoint as llada
from vllm_diffusion.models.sdar.testing import checkpoint as sdar
from vllm_diffusion.testing.tiny_checkpoint import main

if TYPE_CHECKING:
    from pathlib import Path

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sdar": (sdar, {}),
    "sdar-experts": (sdar, {"experts": 4}),
    "llada": (llada, {}),
    "illada": (llada, {"kind": "illada", "kv_heads": 2}),
    "llada-moe": (llada, {"kind": "moe", "experts": 4}),
}

QWEN = {
    *(f"model.layers.1.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")),
    *(f"model.layers.1.self_attn.{part}.weight" for part in ("o_proj", "q_norm", "k_norm")),
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
}
HEAD_NORMS = {f"model.layers.1.self_attn.{part}_norm.weight" for part in ("q", "k")}
EXPERTS = {
    "model.layers.1.mlp.gate.weight",
    *(
        f"model.layers.1.mlp.experts.{index}.{part}_proj.weight"
        for index in range(4)
        for part in ("gate", "up", "down")
    ),
}
DENSE = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
OUTSIDE = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
NAMES = {
    "sdar": QWEN | DENSE | OUTSIDE,
    "sdar-experts": QWEN | EXPERTS | OUTSIDE,
    "illada": (QWEN - HEAD_NORMS) | DENSE | (OUTSIDE - {"lm_head.weight"}),
    "llada-moe": QWEN | EXPERTS | OUTSIDE,
    "llada": {
        *(f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")),
        *(
            f"model.transformer.blocks.1.{part}.weight"
            for part in (
                *("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out"),
                *("ff_norm", "ff_proj", "up_proj", "ff_out"),
            )
        ),
    },
}
"""Those outside the layers, and of the second layer."""


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(case: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    maker, fields = CASES[case]
    made: Path = maker.make_tiny_checkpoint(tmp_path_factory.mktemp(case), maker.TinySpec(**fields))
    return made


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_the_same_spec_gives_the_same_bytes(case: str, checkpoint: Path, tmp_path: Path) -> None:
    maker, fields = CASES[case]
    family = maker.__name__.split(".")[2]
    options = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    torch.rand(3)
    assert main(["--family", family, *options, str(tmp_path)]) == 0
    assert digests(tmp_path) == digests(checkpoint)


def test_weights_have_the_released_names(case: str, checkpoint: Path) -> None:
    named = load_file(checkpoint / "model.safetensors").keys()
    other_layers = (".layers.0.", ".layers.2.", ".blocks.0.", ".blocks.2.")
    assert {name for name in named if not any(map(name.__contains__, other_layers))} == NAMES[case]


def test_another_seed_changes_every_weight(case: str, checkpoint: Path, tmp_path: Path) -> None:
    maker, fields = CASES[case]
    weights = load_file(checkpoint / "model.safetensors")
    maker.make_tiny_checkpoint(tmp_path, maker.TinySpec(**fields, seed=1))
    others = load_file(tmp_path / "model.safetensors")
    assert [name for name in weights if torch.equal(weights[name], others[name])] == []
    assert [name for name, weight in weights.items() if not weight.isfinite().all()] == []


def test_the_tokenizer_reads_back_what_it_wrote(case: str, checkpoint: Path) -> None:
    maker, _ = CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer) == maker.TinySpec().vocab
    assert (
        tokenizer.decode(tokenizer.encode("Zwölf, 12!"), skip_special_tokens=True) == "Zwölf, 12!"
    )
    assert tokenizer.convert_tokens_to_ids(maker.MASK) == maker.MASK_ID
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.count("Hello") == 1
    assert "assistant" in chat


def test_an_impossible_spec_names_every_problem() -> None:
    with pytest.raises(ValueError, match=r"block must be positive, but got 0; experts must be 0"):
        sdar.TinySpec(block=0, experts=1)
    with pytest.raises(
        ValueError, match=r"kind must be one of .*; hidden \(66\) must be a multiple"
    ):
        llada.TinySpec(kind="dream", hidden=66)  # type: ignore[arg-type]
