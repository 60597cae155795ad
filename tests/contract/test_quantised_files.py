"""Quantised files whose parts do not belong together end in one error that names them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.models.diffusion_gemma.weights import whole
from vllm_diffusion.testing.quantised import WEIGHTS, quantise_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

pytestmark = pytest.mark.vllm

Weights = dict[str, "torch.Tensor"]
EXPERTS = 4
EXPERT = "model.decoder.layers.1.experts.2.up_proj"
ATTENTION = "model.decoder.layers.2.self_attn.k_proj"


@pytest.fixture(scope="module", params=["nvfp4", "fp8-dynamic"])
def weights(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Weights:
    folder = tmp_path_factory.mktemp("quantised")
    quantise_checkpoint(tiny_checkpoint, folder, request.param)
    return load_file(folder / WEIGHTS)


def checked(weights: Weights, experts: int | None = EXPERTS) -> Weights:
    return dict(whole(weights.items(), "the model", experts=experts))


def test_a_whole_file_passes_as_it_is(weights: Weights):
    assert checked(weights) == weights


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
    "expert": (drop_module(EXPERT), f"lacks {EXPERT}:"),
    "group-size": (resize(f"{ATTENTION}.weight_scale"), f"{ATTENTION}.weight_scale is ["),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file(what: str, weights: Weights):
    break_it, message = BROKEN[what]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        checked(break_it(weights))


def test_the_scale_of_a_whole_tensor(weights: Weights):
    name = f"{EXPERT}.weight_global_scale"
    if name not in weights:
        pytest.skip("FP8 has none")
    with pytest.raises(CheckpointError, match=re.escape(f"lacks {name}:")):
        checked(drop(name)(weights))


def test_every_problem_is_named(weights: Weights):
    broken = drop(f"{ATTENTION}.weight_scale", f"{EXPERT}.weight_scale")(weights)
    with pytest.raises(CheckpointError) as caught:
        checked(broken)
    assert ATTENTION in str(caught.value)
    assert EXPERT in str(caught.value)


def test_a_rank_that_reads_its_experts_alone(weights: Weights):
    assert len(checked(drop_module(EXPERT)(weights), experts=None)) < len(weights)
