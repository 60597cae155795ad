"""The decoding rule's constants: read from the checkpoint, never guessed, one error for all."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from vllm_diffusion.config import SAMPLER_CLASS, rule_constants
from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.records import RuleConstants

RELEASED: dict[str, Any] = {
    "max_denoising_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "sampler_config": {"_cls_name": SAMPLER_CLASS, "entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106],
}


def changed(**values: object) -> dict[str, Any]:
    """The released constants with some replaced; None leaves one out."""
    generation = copy.deepcopy(RELEASED) | values
    return {key: value for key, value in generation.items() if value is not None}


def message_of(generation: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        rule_constants(generation, source="generation config of /models/tiny")
    return str(caught.value)


def test_the_released_constants_are_read_as_they_stand():
    assert rule_constants(RELEASED, source="x") == RuleConstants(
        max_steps=48,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        confidence_threshold=0.005,
        stability_threshold=1,
    )


def test_an_integer_serves_as_a_number():
    assert rule_constants(changed(t_min=0, t_max=1), source="x").t_max == 1


@pytest.mark.parametrize(
    "constant",
    ["max_denoising_steps", "t_min", "t_max", "stability_threshold", "confidence_threshold"],
)
def test_a_missing_constant_is_named(constant: str):
    assert f"{constant} is missing" in message_of(changed(**{constant: None}))


def test_a_missing_entropy_bound_is_named():
    assert "entropy_bound is missing" in message_of(
        changed(sampler_config={"_cls_name": SAMPLER_CLASS})
    )


def test_a_checkpoint_without_any_constant_gets_one_message_with_the_way_out():
    message = message_of({})
    for problem in (
        "max_denoising_steps is missing",
        "t_min is missing",
        "t_max is missing",
        "confidence_threshold is missing",
        "stability_threshold is missing",
        f"sampler_config must be of class {SAMPLER_CLASS}, got None",
        "generation config of /models/tiny",
        "--generation-config auto",
        "--override-generation-config",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("sampler", "got"),
    [
        ({"_cls_name": "ConfidenceSamplerConfig", "threshold": 0.9}, "'ConfidenceSamplerConfig'"),
        ({"entropy_bound": 0.1}, "None"),
        ("entropy_bound", "'entropy_bound'"),
    ],
)
def test_an_unknown_sampler_class_is_refused_with_what_was_found(sampler: object, got: str):
    assert f"sampler_config must be of class {SAMPLER_CLASS}, got {got}" in message_of(
        changed(sampler_config=sampler)
    )


@pytest.mark.parametrize(
    ("constant", "value", "problem"),
    [
        ("max_denoising_steps", 0, "max_denoising_steps must be at least 1, got 0"),
        ("max_denoising_steps", 48.0, "max_denoising_steps must be an integer, got 48.0"),
        ("max_denoising_steps", True, "max_denoising_steps must be an integer, got True"),
        ("max_denoising_steps", "48", "max_denoising_steps must be an integer, got '48'"),
        ("t_min", -0.1, "t_min must be at least 0.0, got -0.1"),
        ("t_max", "hot", "t_max must be a finite number, got 'hot'"),
        ("t_max", [0.8], "t_max must be a finite number, got [0.8]"),
        ("stability_threshold", -1, "stability_threshold must be at least 0, got -1"),
        ("stability_threshold", 0.5, "stability_threshold must be an integer, got 0.5"),
        ("confidence_threshold", -1, "confidence_threshold must be at least 0.0, got -1"),
    ],
)
def test_a_constant_of_wrong_type_or_range_is_named_with_its_value(
    constant: str, value: object, problem: str
):
    assert problem in message_of(changed(**{constant: value}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("constant", ["t_min", "t_max", "confidence_threshold"])
def test_a_constant_that_is_no_finite_number_is_refused(constant: str, value: float):
    assert f"{constant} must be" in message_of(changed(**{constant: value}))


def test_temperatures_in_the_wrong_order_are_refused():
    assert "t_max (0.3) must not be below t_min (0.4)" in message_of(changed(t_max=0.3))


def test_a_temperature_of_zero_everywhere_is_refused():
    # Every logit is divided by it.
    assert "t_max must be" in message_of(changed(t_min=0.0, t_max=0.0))
