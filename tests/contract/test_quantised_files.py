"""Files that lack a part, or whose parts do not belong together, end in one error that names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from helpers.cases import for_each
from safetensors.torch import load_file
from transformers import AutoConfig
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.models.diffusion_gemma.adapter_form import FORM
from vllm_diffusion.models.diffusion_gemma.weights import unquantised, whole
from vllm_diffusion.testing.quantise import WEIGHTS, quantise_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    import torch

pytestmark = pytest.mark.vllm

Weights = dict[str, "torch.Tensor"]
EXPERTS = 4
LAYER = "model.decoder.layers.1"
EXPERT = f"{LAYER}.experts.2.up_proj"
ATTENTION = "model.decoder.layers.2.self_attn.k_proj"
GROUPED = ("nvfp4", "modelopt-nvfp4")
QUANTISED = (*GROUPED, "fp8-dynamic")


def of_files(forms: tuple[str, ...]) -> pytest.MarkDecorator:
    """A test of some of the files alone."""
    return pytest.mark.parametrize("stored", forms, indirect=True, scope="module")


@pytest.fixture(scope="module", params=[*QUANTISED, "plain"])
def stored(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Weights:
    """The weights of a file, its experts one by one."""
    folder = tmp_path_factory.mktemp("file")
    if request.param in QUANTISED:
        return load_file(quantise_checkpoint(tiny_checkpoint, folder, request.param) / WEIGHTS)
    return load_file(tiny_checkpoint / WEIGHTS)


@pytest.fixture(scope="module")
def modules(tiny_checkpoint: Path) -> list[str]:
    return list(FORM.matrices(AutoConfig.from_pretrained(tiny_checkpoint).text_config))


@pytest.fixture
def checked(modules: list[str]) -> Callable[..., Weights]:
    def check(weights: Weights, experts: int | None = EXPERTS) -> Weights:
        return dict(whole(weights.items(), "the model", modules=modules, experts=experts))

    return check


Check = Callable[..., Weights]


def test_a_whole_file_passes_as_it_is(stored: Weights, checked: Check):
    assert checked(stored) == stored
    assert checked(stored, experts=None) == stored


def test_a_quantised_router_or_head_is_named(stored: Weights, checked: Check):
    """Every router, as a recipe without an ignore list leaves it, and a head of its own."""
    assert dict(unquantised(stored.items(), "the model", known=())) == stored
    routers = [name.removesuffix(".weight") for name in stored if "router.proj" in name]
    parts = {name.rpartition(".")[2] for name in stored if name.startswith(f"{EXPERT}.")}
    scales = [
        f"{module}.{part}"
        for module in (*routers, "lm_head")
        for part in parts - {"weight"} or {"weight_scale"}
    ]
    bad = stored | dict.fromkeys(scales, stored[f"{routers[0]}.weight"])
    with pytest.raises(CheckpointError, match="quantised where it cannot be served so") as caught:
        # As it is loaded: what is found in the whole file comes after.
        checked(dict(unquantised(bad.items(), "the model", known=())))
    assert all(module in str(caught.value) for module in (*routers, "lm_head"))
    # A head that has a place for its scales is the layers' business.
    assert dict(unquantised(bad.items(), "the model", known=scales)) == bad


def drop(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: one for name, one in weights.items() if name not in names}


def drop_module(module: str) -> Callable[[Weights], Weights]:
    return lambda weights: {
        name: one for name, one in weights.items() if not name.startswith(f"{module}.")
    }


def resize(name: str) -> Callable[[Weights], Weights]:
    """A scale for other groups of inputs than the codes have."""
    return lambda weights: weights | {name: weights[name].repeat(1, 2)}


BROKEN = {
    "scale": (drop(f"{ATTENTION}.weight_scale"), f"lacks {ATTENTION}.weight_scale:"),
    "scale-of-an-expert": (drop(f"{EXPERT}.weight_scale"), f"lacks {EXPERT}.weight_scale:"),
    "codes": (
        drop(f"{EXPERT}.weight_packed", f"{EXPERT}.weight"),
        f"lacks the weights of {EXPERT}:",
    ),
    "expert": (drop_module(EXPERT), f"lacks the weights of {EXPERT}:"),
    "group-size": (resize(f"{ATTENTION}.weight_scale"), f"{ATTENTION}.weight_scale is ["),
}


@of_files(QUANTISED)
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file(what: str, stored: Weights, checked: Check):
    break_it, message = BROKEN[what]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checked(break_it(stored))


FUSED = [f"self_attn.{one}_proj" for one in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
CONDITIONING = "model.decoder.self_conditioning.up_proj"


@for_each(module=[*(f"{LAYER}.{one}" for one in FUSED), CONDITIONING])
def test_a_part_of_a_fused_matrix(module: str, stored: Weights, checked: Check):
    with pytest.raises(CheckpointError, match=re.escape(f"lacks the weights of {module}:")):
        checked(drop_module(module)(stored))


@of_files(QUANTISED)
def test_a_part_of_every_expert(stored: Weights, checked: Check):
    broken = stored
    for number in range(EXPERTS):
        broken = drop_module(f"{LAYER}.experts.{number}.up_proj")(broken)
    for experts in (EXPERTS, None):
        with pytest.raises(CheckpointError, match="lacks the weights of") as caught:
            checked(broken, experts)
        for number in range(EXPERTS):
            assert f"{LAYER}.experts.{number}.up_proj" in str(caught.value)


def test_all_experts_of_a_layer(stored: Weights, checked: Check):
    broken = drop_module(f"{LAYER}.experts")(stored)
    expected = f"lacks the weights of {LAYER}.experts.gate_up_proj, {LAYER}.experts.down_proj:"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        checked(broken)


@of_files(GROUPED)
def test_the_scale_of_a_whole_tensor(stored: Weights, checked: Check):
    (name,) = {f"{EXPERT}.weight_global_scale", f"{EXPERT}.weight_scale_2"} & stored.keys()
    with pytest.raises(CheckpointError, match=re.escape(f"lacks {name}:")):
        checked(drop(name)(stored))


@of_files(QUANTISED)
def test_every_problem_is_named(stored: Weights, checked: Check):
    broken = drop(f"{ATTENTION}.weight_scale", f"{EXPERT}.weight_scale")(stored)
    with pytest.raises(CheckpointError) as caught:
        checked(broken)
    assert ATTENTION in str(caught.value)
    assert EXPERT in str(caught.value)


@of_files(QUANTISED)
def test_a_rank_that_reads_its_experts_alone(stored: Weights, checked: Check):
    # Which tensors of other ranks' experts vLLM leaves out.
    codes = [name for name in stored if should_skip_weight(name, {0, 1, 3})]
    assert any(EXPERT in name for name in codes)
    shared = drop(*codes)(stored)
    assert checked(shared, experts=None) == shared
    with pytest.raises(CheckpointError, match=re.escape(f"lacks the weights of {EXPERT}:")):
        checked(drop_module(EXPERT)(stored), experts=None)
