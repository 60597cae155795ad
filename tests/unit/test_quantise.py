"""The maker of quantised checkpoints: names, shapes, dtypes and ignore list as released."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, get_args

import pytest
import torch
from helpers.dequantised import matrix
from safetensors.torch import load_file

from vllm_diffusion.testing.quantise import WEIGHTS, Form, main, quantise_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYER = "model.decoder.layers.2."  # full attention: keys are values
LEFT_ALONE = (
    "model.decoder.embed_tokens.weight",
    f"{LAYER}router.proj.weight",
    "model.decoder.self_conditioning.gate_proj.weight",
    "model.encoder.embed_vision.embedding_projection.weight",
)
PARTS = {
    "nvfp4": {
        "weight_packed": (torch.uint8, [64, 32]),
        "weight_scale": (torch.float8_e4m3fn, [64, 4]),
        "weight_global_scale": (torch.float32, [1]),
        "input_global_scale": (torch.float32, [1]),
    },
    "modelopt-nvfp4": {
        "weight": (torch.uint8, [64, 32]),
        "weight_scale": (torch.float8_e4m3fn, [64, 4]),
        "weight_scale_2": (torch.float32, []),
        "input_scale": (torch.float32, []),
    },
    "fp8-dynamic": {
        "weight": (torch.float8_e4m3fn, [64, 64]),
        "weight_scale": (torch.bfloat16, [64, 1]),
    },
}


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(dtype="bfloat16")


@pytest.mark.parametrize("form", get_args(Form))
def test_layout(form: Form, plain: Path, tmp_path: Path):
    stored = load_file(quantise_checkpoint(plain, tmp_path, form) / WEIGHTS)
    expert = f"{LAYER}experts.3.up_proj."
    found = {
        name.removeprefix(expert): (one.dtype, list(one.shape))
        for name, one in stored.items()
        if name.startswith(expert)
    }
    assert found == PARTS[form]
    assert not [name for name in stored if "experts.gate_up_proj" in name]
    assert not [name for name in stored if name.startswith(f"{LAYER}self_attn.v_proj")]
    original = load_file(plain / WEIGHTS)
    for name in LEFT_ALONE:
        assert torch.equal(stored[name], original[name])


@pytest.mark.parametrize("form", get_args(Form))
def test_what_config_json_says(form: Form, plain: Path, tmp_path: Path):
    folder = quantise_checkpoint(plain, tmp_path, form)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if form == "modelopt-nvfp4":
        assert (said["quant_method"], said["quant_algo"]) == ("modelopt", "NVFP4")
    else:
        assert said["quant_method"] == "compressed-tensors"
        assert said["config_groups"]["group_0"]["targets"] == ["Linear"]
    ignored = set(said["ignore"])
    assert {name.removesuffix(".weight") for name in LEFT_ALONE[1:]} | {"lm_head"} <= ignored
    assert not [name for name in ignored if "experts" in name or "layers.2.mlp" in name]


# Half the step between neighbours: 1/16 of a number with three bits after the point; in FP4 the
# step between 4 and 6, of a group whose largest becomes 6 or, where its scale is rounded, nearly 6.
@pytest.mark.parametrize(("form", "most"), [("fp8-dynamic", 1 / 16), ("nvfp4", 1.2 / 6)])
def test_rounding(form: Form, most: float, plain: Path, tmp_path: Path):
    stored = load_file(quantise_checkpoint(plain, tmp_path, form) / WEIGHTS)
    module = f"{LAYER}mlp.down_proj"
    weight = load_file(plain / WEIGHTS)[f"{module}.weight"].double()
    peak = weight.view(len(weight), -1, 16).abs().amax(-1).repeat_interleave(16, 1)
    error = (matrix(stored, module) - weight).abs()
    assert (error <= most * peak).all()
    assert error.any()


def test_groups_err_no_more_than_with_the_scale_of_their_largest_weight(
    plain: Path, tmp_path: Path
):
    stored = load_file(quantise_checkpoint(plain, tmp_path, "nvfp4") / WEIGHTS)
    module = f"{LAYER}mlp.down_proj"
    weight = load_file(plain / WEIGHTS)[f"{module}.weight"].double()
    groups = weight.view(len(weight), -1, 16)
    overall = stored[f"{module}.weight_global_scale"]
    largest = (groups.abs().amax(-1) / 6 * overall).to(torch.float8_e4m3fn)
    scale = (largest.double() / overall)[..., None]
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nearest = ((groups / scale).abs()[..., None] - numbers).abs().argmin(-1)
    peer = (numbers[nearest] * scale - groups.abs()).square().sum(-1)
    error = (matrix(stored, module).view_as(groups) - groups).square().sum(-1)
    assert (error <= peer * (1 + 1e-6)).all()
    assert error.sum() < 0.8 * peer.sum()


def test_what_is_fused_shares_a_scale(plain: Path, tmp_path: Path):
    stored = load_file(quantise_checkpoint(plain, tmp_path, "nvfp4") / WEIGHTS)
    layer, names = "model.decoder.layers.0.self_attn", ("q_proj", "k_proj", "v_proj")
    scales = {float(stored[f"{layer}.{name}.weight_global_scale"]) for name in names}
    assert len(scales) == 1


def test_sizes_that_do_not_fit(make_checkpoint: Callable[..., Path], tmp_path: Path):
    odd = make_checkpoint(expert_intermediate=40)
    with pytest.raises(ValueError, match="40 inputs, which are no groups of 16"):
        quantise_checkpoint(odd, tmp_path, "nvfp4")


def test_command(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(plain), str(tmp_path / "made"), "--form", "fp8-dynamic"]) == 0
    assert "bytes" in capsys.readouterr().out
    assert (tmp_path / "made" / "tokenizer.json").exists()
