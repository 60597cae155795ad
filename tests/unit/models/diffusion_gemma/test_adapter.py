"""Reading PEFT's files: what is placed where, and everything that is wrong in one message."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_diffusion.engine.lora.form import AdapterBase
from vllm_diffusion.engine.lora.peft import CONFIG, WEIGHTS, check_adapter, read_adapter
from vllm_diffusion.errors import AdapterError
from vllm_diffusion.models.diffusion_gemma.adapter_form import CANVAS, FORM, TEXT
from vllm_diffusion.models.diffusion_gemma.testing.adapters import (
    DECODER,
    ENCODER,
    ONE_STACK,
    changes,
    write_adapter,
)
from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, build_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from vllm_diffusion.engine.lora.peft import Adapter, Factors, Parts

RANK = 4
FULL_LAYER = 2
FP32 = torch.float32


@pytest.fixture(scope="module")
def base() -> AdapterBase:
    config = build_model(TinySpec()).config.text_config
    return AdapterBase.of(FORM, config, name="tiny", max_rank=RANK)


@pytest.fixture
def write(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    def make(**what: Any) -> Path:
        return write_adapter(tmp_path / "adapter", tiny_checkpoint, **({"rank": RANK} | what))

    return make


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    factors = load_file(folder / WEIGHTS)
    change(factors)
    save_file(factors, folder / WEIGHTS)
    return folder


def problem(folder: Path, base: AdapterBase) -> str:
    with pytest.raises(AdapterError) as caught:
        check_adapter(folder, base)
    with pytest.raises(AdapterError, match="cannot be served"):
        read_adapter(folder, base, FP32)
    return str(caught.value)


def product(factors: Factors | None) -> torch.Tensor:
    assert factors is not None
    return factors.b @ factors.a


def test_every_linear_of_transformers_can_be_adapted_and_no_other(base: AdapterBase) -> None:
    decoder = build_model(TinySpec()).model.decoder
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    experts = {
        name: (weight.shape[2], weight.shape[1])
        for name, weight in decoder.named_parameters()
        if ".experts." in name
    }
    shapes = {name: matrix.shape for name, matrix in base.matrices.items()}
    assert shapes == linears | experts


def test_factors_are_placed_by_kind_of_row(base: AdapterBase, write: Callable[..., Path]) -> None:
    folder = write(alike=False)
    adapter = read_adapter(folder, base, FP32)
    assert set(adapter[CANVAS]) - set(adapter[TEXT]) == {
        "self_conditioning.gate_up_proj",
        "self_conditioning.down_proj",
    }
    sides: dict[str, Mapping[str, Parts]] = {ENCODER: adapter[TEXT], DECODER: adapter[CANVAS]}
    for tree, side in sides.items():
        for name, change in changes(folder, tree, TinySpec().experts).items():
            matrix = base.matrices[name.removesuffix(".weight")]
            torch.testing.assert_close(product(side[matrix.path][matrix.part]), change)


def test_keys_of_a_full_layer_are_its_values(base: AdapterBase, write: Callable[..., Path]) -> None:
    canvas = read_adapter(write(only=("k_proj",)), base, FP32)[CANVAS]
    queries, keys, values = canvas[f"model.layers.{FULL_LAYER}.self_attn.qkv_proj"]
    assert queries is None
    assert keys is values
    assert canvas["model.layers.0.self_attn.qkv_proj"][2] is None


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_tensor_of_the_experts_leaves_the_other_unchanged(
    base: AdapterBase, write: Callable[..., Path], name: str
) -> None:
    folder = write(only=(f"experts.{name}",))
    both = read_adapter(folder, base, FP32)[TEXT]["model.layers.0.experts"]
    changed = [bool(product(part).any()) for part in both]
    assert changed == [name == "gate_up_proj", name == "down_proj"]


def test_one_tree_alone_leaves_the_other_the_base_model(
    base: AdapterBase, write: Callable[..., Path]
) -> None:
    adapter: Adapter = read_adapter(write(trees=(DECODER,)), base, FP32)
    assert not adapter[TEXT]
    assert adapter[CANVAS]


AUTOMODEL = "automodel_peft_config.json"


@pytest.mark.parametrize(
    ("what", "prefix"),
    [
        ({"trees": (ONE_STACK,)}, True),
        ({"trees": (DECODER,), "options": {"shared_stack": True}}, True),
        ({"trees": (DECODER,)}, True),
        ({"trees": (DECODER,)}, False),  # of a quantised base model
    ],
)
def test_factors_of_one_stack_serve_both_kinds_of_row(
    base: AdapterBase,
    write: Callable[..., Path],
    what: dict[str, Any],
    prefix: bool,
) -> None:
    alike = read_adapter(write(), base, FP32)
    folder = write(**what)
    if "options" not in what:
        (folder / AUTOMODEL).write_text("{}")
    if not prefix:
        factors = load_file(folder / WEIGHTS)
        bare = {name.removeprefix("base_model.model."): each for name, each in factors.items()}
        save_file(bare, folder / WEIGHTS)
    coverage = check_adapter(folder, base)
    assert (coverage.kinds, coverage.shared) == ({TEXT, CANVAS}, True)
    one = read_adapter(folder, base, FP32)
    for ours, theirs in ((one[kind], alike[kind]) for kind in (TEXT, CANVAS)):
        assert ours.keys() == theirs.keys()
        for path, parts in ours.items():
            for part, same in zip(parts, theirs[path], strict=True):
                assert (part is None) == (same is None)
                if part is not None:
                    torch.testing.assert_close(product(part), product(same))


def test_what_a_user_says_of_the_stack_wins(base: AdapterBase, write: Callable[..., Path]) -> None:
    folder = write(trees=(DECODER,), options={"shared_stack": False})
    (folder / AUTOMODEL).write_text("{}")
    coverage = check_adapter(folder, base)
    assert (coverage.kinds, coverage.shared) == ({CANVAS}, False)
    assert "shared_stack must be true or false, got 'yes'" in problem(
        write(options={"shared_stack": "yes"}), base
    )


def test_factors_of_one_stack_beside_those_of_a_tree_are_refused(
    base: AdapterBase, write: Callable[..., Path]
) -> None:
    message = problem(write(options={"shared_stack": True}), base)
    assert "factors given twice for the same rows: model.encoder.language_model.layers.0" in message


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 8 / math.sqrt(RANK)),
        ({"alpha_pattern": {"layers.0.mlp.down_proj": 20}}, 5.0),
        ({"alpha_pattern": {r".*\.mlp\..*": 12, "down_proj": 20}}, 3.0),
        ({"alpha_pattern": {"own_proj": 20}}, 2.0),
    ],
)
def test_the_scale_is_pefts(
    base: AdapterBase, write: Callable[..., Path], options: dict[str, Any], scale: float
) -> None:
    folder = write(only=("layers.0.mlp.down_proj",), options=options)
    [factors] = read_adapter(folder, base, FP32)[TEXT]["model.layers.0.mlp.down_proj"]
    file = load_file(folder / WEIGHTS)
    b = file[f"base_model.model.{ENCODER}layers.0.mlp.down_proj.lora_B.weight"]
    assert factors is not None
    torch.testing.assert_close(factors.b, b * scale)


def test_a_rank_of_its_own_is_pefts(base: AdapterBase, write: Callable[..., Path]) -> None:
    folder = write(rank=2, only=("mlp",), options={"r": 3, "rank_pattern": {"mlp.*": 2}})
    [factors] = read_adapter(folder, base, FP32)[TEXT]["model.layers.0.mlp.down_proj"]
    assert factors is not None
    assert factors.a.shape[0] == 2


def test_an_image_tower_that_training_left_alone_is_no_obstacle(
    base: AdapterBase, write: Callable[..., Path]
) -> None:
    name = "base_model.model.model.encoder.embed_vision.embedding_projection.lora"

    def add(change: float) -> Callable[[dict[str, torch.Tensor]], object]:
        return lambda factors: factors.update(
            {f"{name}_A.weight": torch.ones(4, 32), f"{name}_B.weight": torch.full((64, 4), change)}
        )

    folder = edit(write(), add(0.0))
    check_adapter(folder, base)
    message = problem(edit(folder, add(0.1)), base)
    assert "served without adapters: model.encoder.embed_vision.embedding_projection" in message


BROKEN = {
    "no configuration": (lambda path: (path / CONFIG).unlink(), f"there is no {CONFIG}"),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), f"there is no {WEIGHTS}"),
    "no JSON": (lambda path: (path / CONFIG).write_text("{"), "cannot be read"),
    "not a LoRA": (lambda path: (path / CONFIG).write_text("[]"), "is not of a LoRA adapter"),
    "cut": (
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-10]),
        "is damaged or incomplete",
    ),
    "empty": (lambda path: save_file({}, path / WEIGHTS), "adapts nothing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(base: AdapterBase, write: Callable[..., Path], name: str) -> None:
    folder = write()
    damage, expected = BROKEN[name]
    damage(folder)
    assert expected in problem(folder, base)


OPTIONS = [
    ({"use_dora": True}, "use_dora is not served"),
    ({"modules_to_save": ["norm"]}, "modules_to_save is not served"),
    ({"lora_bias": True}, "lora_bias is not served"),
    ({"bias": "all"}, "bias is not served"),
    ({"init_lora_weights": "pissa"}, "'pissa' changes the base model's weights too"),
    ({"r": 0}, "r must be a positive integer, got 0"),
    ({"r": "4"}, "r must be a positive integer, got '4'"),
    ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
    ({"rank_pattern": {"(": 4}}, "must map regular expressions to numbers"),
    ({"rank_pattern": ["q_proj"]}, "must map regular expressions to numbers"),
    ({"rank_pattern": {"q_proj": 5}}, "its rank 5 is above 4, see --max-lora-rank"),
    ({"r": 3}, "expected [3, 128] and [64, 3]"),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=[text for _, text in OPTIONS])
def test_what_is_not_served_is_named(
    base: AdapterBase, write: Callable[..., Path], options: dict[str, Any], expected: str
) -> None:
    assert expected in problem(write(options=options), base)


def test_an_initial_value_of_the_factors_alone_is_served(
    base: AdapterBase, write: Callable[..., Path]
) -> None:
    check_adapter(write(options={"init_lora_weights": "gaussian"}), base)


def test_all_problems_are_in_one_message(base: AdapterBase, write: Callable[..., Path]) -> None:
    prefix = f"base_model.model.{DECODER}layers"

    def spoil(factors: dict[str, torch.Tensor]) -> None:
        del factors[f"{prefix}.0.mlp.up_proj.lora_B.weight"]
        factors[f"{prefix}.1.mlp.up_proj.lora_A.weight"] = torch.ones(RANK, 65)
        factors[f"{prefix}.2.norm.weight"] = torch.ones(64)
        for layer in range(3, 8):
            for factor in "AB":
                name = f"{prefix}.{layer}.mlp.up_proj.lora_{factor}.weight"
                factors[name] = torch.ones(RANK, RANK)

    message = problem(edit(write(options={"use_dora": True}), spoil), base)
    for part in (
        "use_dora is not served",
        f"not low-rank factors: {prefix}.2.norm.weight",
        "modules the model does not have (the adapter is for ",
        "model.decoder.layers.3.mlp.up_proj",
        " and 2 more",
        "model.decoder.layers.0.mlp.up_proj lacks lora_B",
        "model.decoder.layers.1.mlp.up_proj is [4, 65] and [128, 4], expected [4, 64]",
    ):
        assert part in message


@pytest.mark.parametrize("name", ["lm_head", "model.decoder.embed_tokens"])
def test_the_head_and_the_embedding_are_not_adapted(
    base: AdapterBase, write: Callable[..., Path], name: str
) -> None:
    def add(factors: dict[str, torch.Tensor]) -> None:
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(RANK, 64)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(512, RANK)

    assert f"): {name}" in problem(edit(write(), add), base)


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        ({"qkv_proj", "o_proj"}, None),
        ({"q_proj", "k_proj", "v_proj", "o_proj"}, None),
        ({"q_proj"}, "model.decoder.layers.0.self_attn.k_proj"),
    ],
)
def test_targets_of_the_deployment_hold(
    base: AdapterBase, write: Callable[..., Path], targets: set[str], refused: str | None
) -> None:
    folder = write(only=("self_attn",))
    limited = replace(base, targets=frozenset(targets))
    if refused is None:
        check_adapter(folder, limited)
    else:
        assert refused in problem(folder, limited)


def test_experts_are_a_target_of_their_own(base: AdapterBase) -> None:
    limited = replace(base, targets=frozenset({"down_proj"}))
    assert limited.serves("layers.0.mlp.down_proj")
    assert not limited.serves("layers.0.experts.down_proj")
    assert replace(base, targets=frozenset({"experts"})).serves("layers.0.experts.down_proj")


def test_experts_of_a_quantised_checkpoint_stay_as_they_are(
    base: AdapterBase, write: Callable[..., Path]
) -> None:
    fixed = replace(base, fixed_experts=True)
    message = problem(write(only=("experts", "q_proj")), fixed)
    assert "served without adapters: model.decoder.layers.0.experts" in message
    assert "q_proj" not in message
    check_adapter(write(only=("q_proj",)), fixed)


def test_the_writer_says_what_peft_says(write: Callable[..., Path]) -> None:
    """Names and shapes as PEFT 0.21.2 wrote them for this checkpoint, see `testing.adapters`."""
    factors = load_file(write() / WEIGHTS)
    shapes = {
        name.removeprefix("base_model.model.model.decoder."): tuple(factor.shape)
        for name, factor in factors.items()
        if name.startswith("base_model.model.model.decoder.layers.2.")
    }
    prefix = "layers.2."
    assert (
        shapes.items()
        >= {
            f"{prefix}self_attn.q_proj.lora_A.weight": (4, 64),
            f"{prefix}self_attn.q_proj.lora_B.weight": (256, 4),
            f"{prefix}self_attn.k_proj.lora_B.weight": (64, 4),
            f"{prefix}router.proj.lora_B.weight": (4, 4),
            f"{prefix}experts.base_layer.lora_A.weight": (16, 64),
            f"{prefix}experts.base_layer.lora_B.weight": (128, 16),
            f"{prefix}experts.lora_A.weight": (16, 64),
            f"{prefix}experts.lora_B.weight": (64, 16),
        }.items()
    )
    assert f"{prefix}self_attn.v_proj.lora_A.weight" not in shapes
    config = json.loads((write() / CONFIG).read_text())
    assert config["peft_type"] == "LORA"
