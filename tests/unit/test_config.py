"""The decoding rule's constants: who wins, none of them guessed, one error for all."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from helpers.cases import for_each

from vllm_diffusion.config import (
    Served,
    describe,
    fused_commit,
    head_memory,
    head_weights,
    served_rules,
)
from vllm_diffusion.denoise.constants import (
    EntropyBoundConstants,
    RevealConstants,
    ServedRules,
)
from vllm_diffusion.denoise.presets import PRESETS, REFERENCE, preset_names
from vllm_diffusion.errors import CheckpointError, ConfigError
from vllm_diffusion.family import Family, Text
from vllm_diffusion.head.output_copy import HEAD_FORMS
from vllm_diffusion.request.options import DiffusionParams, requested_rule

[SAMPLER_CLASS] = EntropyBoundConstants.sections.values()
RELEASED: dict[str, Any] = {
    "max_denoising_steps": 48,
    "t_min": 0.4,
    "t_max": 0.8,
    "sampler_config": {"_cls_name": SAMPLER_CLASS, "entropy_bound": 0.1},
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 106],
}

PUBLISHED = EntropyBoundConstants(
    max_steps=48,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    confidence_threshold=0.005,
    stability_threshold=1,
)


def changed(**values: object) -> dict[str, Any]:
    """The released constants with some replaced; None leaves one out."""
    generation = copy.deepcopy(RELEASED) | values
    return {key: value for key, value in generation.items() if value is not None}


def message_of(generation: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        served_rules(generation, source="generation config of /models/tiny")
    return str(caught.value)


def rules_of(generation: dict[str, Any] = RELEASED, **options: Any) -> ServedRules:
    return served_rules(generation, source="x", **options)[0]


def refusal_of(**options: Any) -> str:
    """What is said of options on top of the released checkpoint."""
    with pytest.raises(ConfigError) as caught:
        served_rules(RELEASED, source="x", **options)
    return str(caught.value)


def test_the_released_constants_are_read_as_they_stand():
    rules, origins = served_rules(RELEASED, source="x")
    assert rules.default == PUBLISHED
    assert rules.presets[REFERENCE] == PUBLISHED
    assert origins == {}


def test_an_integer_serves_as_a_number():
    assert rules_of(changed(t_min=0, t_max=1)).default.t_max == 1


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
        ("max_denoising_steps", 0, "max_denoising_steps must be a positive integer, got 0"),
        ("max_denoising_steps", 48.0, "max_denoising_steps must be a positive integer, got 48.0"),
        ("max_denoising_steps", True, "max_denoising_steps must be a positive integer, got True"),
        ("max_denoising_steps", "48", "max_denoising_steps must be a positive integer, got '48'"),
        ("t_min", -0.1, "t_min must be a finite number of at least 0, got -0.1"),
        (
            "t_max",
            "hot",
            "t_max must be a finite number of at least 1e-06 (logits are divided by it), got 'hot'",
        ),
        (
            "t_max",
            [0.8],
            "t_max must be a finite number of at least 1e-06 (logits are divided by it), got [0.8]",
        ),
        ("stability_threshold", -1, "stability_threshold must be an integer of at least 0, got -1"),
        (
            "stability_threshold",
            0.5,
            "must be an integer of at least 0, got 0.5",
        ),
        ("t_max", 10**400, "t_max must be a finite number of at most 1e+06, got 1000"),
        ("max_denoising_steps", 2**63, "max_denoising_steps must be at most 1024, got 9223"),
        (
            "confidence_threshold",
            -1,
            "confidence_threshold must be a finite number of at least 0",
        ),
    ],
)
def test_a_constant_of_wrong_type_or_range_is_named_with_its_value(
    constant: str, value: object, problem: str
):
    assert problem in message_of(changed(**{constant: value}))


@for_each(value=[float("nan"), float("inf")])
@pytest.mark.parametrize("constant", ["t_min", "t_max", "confidence_threshold"])
def test_a_constant_that_is_no_finite_number_is_refused(constant: str, value: float):
    assert f"{constant} must be" in message_of(changed(**{constant: value}))


def test_temperatures_in_the_wrong_order_are_refused():
    assert "t_max (0.3) must not be below t_min (0.4)" in message_of(changed(t_max=0.3))


def test_a_temperature_of_zero_everywhere_is_refused():
    # Every logit is divided by it.
    assert "t_max must be" in message_of(changed(t_min=0.0, t_max=0.0))


# ---- precedence ----

# Every place that can name the step limit, the weakest first, with the value that it names.
PLACES = {
    "generation_config.json": 48,
    "override_generation_config": 47,
    "diffusion_config": 46,
    "preset of additional_config": 45,
    "additional_config": 44,
    "preset of the request": 43,
    "option of the request": 42,
}
OPTIONAL = list(PLACES)[1:]


@for_each(
    named=[
        chosen
        for size in range(len(OPTIONAL) + 1)
        for chosen in itertools.combinations(OPTIONAL, size)
    ]
)
def test_of_all_that_name_a_constant_the_strongest_wins(
    named: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(
        PRESETS["entropy_bound"], "served", {"max_steps": PLACES["preset of additional_config"]}
    )
    monkeypatch.setitem(
        PRESETS["entropy_bound"], "asked", {"max_steps": PLACES["preset of the request"]}
    )
    additional = {}
    if "preset of additional_config" in named:
        additional["preset"] = "served"
    if "additional_config" in named:
        additional["max_steps"] = PLACES["additional_config"]
    override = {"max_denoising_steps": PLACES["override_generation_config"]}
    limit = PLACES["diffusion_config"]
    rules, origins = served_rules(
        RELEASED,
        source="x",
        override=override if "override_generation_config" in named else {},
        max_denoising_steps=limit if "diffusion_config" in named else None,
        additional=additional or None,
    )
    asked = DiffusionParams(
        preset="asked" if "preset of the request" in named else None,
        constants={"max_steps": PLACES["option of the request"]}
        if "option of the request" in named
        else {},
    )
    winner = max(("generation_config.json", *named), key=list(PLACES).index)
    assert requested_rule(asked, rules) == replace(PUBLISHED, max_steps=PLACES[winner])
    # The log names who changed the default rule, whatever a request asks for.
    *_, last = (None, *(place for place in named if "request" not in place))
    last = "preset served" if last == "preset of additional_config" else last
    assert origins == ({"max_steps": last} if last else {})


def test_the_preset_of_a_request_stands_in_for_the_engines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PRESETS["entropy_bound"], "served", {"t_max": 0.7, "max_steps": 9})
    monkeypatch.setitem(PRESETS["entropy_bound"], "asked", {"max_steps": 5})
    rules = rules_of(additional={"preset": "served", "entropy_bound": 0.2})
    assert rules.default == replace(PUBLISHED, t_max=0.7, max_steps=9, entropy_bound=0.2)
    # Nothing of the engine's preset is left; what the engine names itself is.
    asked = requested_rule(DiffusionParams(preset="asked"), rules)
    assert asked == replace(PUBLISHED, max_steps=5, entropy_bound=0.2)


def test_reference_is_the_published_rule_whatever_the_engine_gives_by_default():
    rules = rules_of(
        override={"t_max": 0.9},
        max_denoising_steps=24,
        additional={"preset": "fast", "t_max": 0.7, "stability_threshold": 3},
    )
    published = replace(PUBLISHED, t_max=0.9, max_steps=24)
    assert requested_rule(DiffusionParams(preset=REFERENCE), rules) == published
    assert rules.default != published
    near = rules_of(additional={"soft_embedding_top_k": 16})
    assert requested_rule(DiffusionParams(preset=REFERENCE), near) == PUBLISHED
    assert {near.default.soft_embedding_top_k, near.presets["fast"].soft_embedding_top_k} == {16}
    again = rules_of(additional={"preset": REFERENCE})
    assert again.default == PUBLISHED


def test_an_overridden_sampler_keeps_what_it_does_not_name():
    override = {"sampler_config": {"entropy_bound": 0.3}}
    rules, origins = served_rules(RELEASED, source="x", override=override)
    assert rules.default == replace(PUBLISHED, entropy_bound=0.3)
    assert origins == {"entropy_bound": "override_generation_config"}


def test_overrides_that_are_no_constants_change_nothing():
    override = {"temperature": 0.3, "max_new_tokens": None}
    assert served_rules(RELEASED, source="x", override=override) == (rules_of(), {})


def test_overrides_make_up_for_what_a_checkpoint_lacks():
    override = {"t_min": 0.4, "sampler_config": RELEASED["sampler_config"]}
    bare = changed(t_min=None, sampler_config=None, max_denoising_steps=None)
    assert rules_of(bare, override=override, max_denoising_steps=48).default == PUBLISHED


def test_the_engine_remembers_enough_for_every_rule_that_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch,
):
    assert rules_of().remembered == 1
    assert rules_of(additional={"stability_threshold": 4}).remembered == 4
    # The checkpoint's own number stays in reach.
    assert rules_of(additional={"stability_threshold": 0}).remembered == 1
    monkeypatch.setitem(PRESETS["entropy_bound"], "patient", {"stability_threshold": 3})
    assert rules_of().remembered == 3


def test_a_rule_is_described_with_the_origin_of_what_was_changed():
    rules, origins = served_rules(
        RELEASED,
        source="x",
        max_denoising_steps=24,
        override={"t_max": 0.9},
        additional={"stability_threshold": 2},
    )
    assert describe(rules.default, origins) == (
        "max_steps=24 (diffusion_config), t_min=0.4, t_max=0.9 (override_generation_config), "
        "entropy_bound=0.1, confidence_threshold=0.005, stability_threshold=2 (additional_config), "
        "hold_threshold=0.0, doubt_threshold=0.0, "
        "soft_embedding_top_k=0"
    )


def test_what_is_served_travels_as_json() -> None:
    rules = rules_of(additional={"preset": "fast"})
    served = Served(
        canvas_length=32,
        rules=rules,
        family=Family(name="x", rule="entropy_bound", text=Text.BLOCK, block=4, ends=(1, 106)),
        head_memory_mb=64,
        head_weights="int8",
    )
    assert Served.from_dict(json.loads(json.dumps(served.to_dict()))) == served


def test_the_heads_memory_is_no_constant_of_a_rule():
    assert rules_of(additional={"head_memory_mb": 64}) == rules_of()
    assert [head_memory(asked) for asked in (None, {}, {"head_memory_mb": 64})] == [256, 256, 64]


def test_what_the_head_reads_is_no_constant_of_a_rule():
    asked = [{"head_weights": form} for form in ("exact", *HEAD_FORMS)]
    assert all(rules_of(additional=one) == rules_of() for one in asked)
    assert [head_weights(one) for one in (None, {}, *asked)] == [None, None, None, *HEAD_FORMS]


# ---- options that cannot be served ----


@pytest.mark.parametrize(
    ("additional", "fused"),
    [
        (None, True),
        ({}, True),
        ({"fused_commit": True, "max_steps": 3}, True),
        ({"fused_commit": False}, False),
        ({"fused_commit": 0}, False),
    ],
)
def test_whether_commits_are_fused_is_no_constant_of_the_rule(
    additional: dict[str, Any] | None, *, fused: bool
):
    rules = rules_of(additional=additional)
    assert rules.default == replace(PUBLISHED, max_steps=rules.default.max_steps)
    assert fused_commit(additional) is fused


@pytest.mark.parametrize(
    ("additional", "problem"),
    [
        ("fast", "additional_config[\"diffusion\"] must be an object, got 'fast'"),
        ({"preset": "quick"}, f"preset must be one of {', '.join(preset_names())}, got 'quick'"),
        ({"preset": None}, f"preset must be one of {', '.join(preset_names())}, got None"),
        ({"preset": ["fast"]}, "got ['fast']"),
        ({"steps": 3}, "has no 'steps'; accepted: preset, max_steps, t_min, t_max"),
        ({"canvas_length": 32}, "names canvas_length, which --diffusion-config sets"),
        ({"max_steps": 0}, "max_steps must be a positive integer, got 0"),
        ({"stability_threshold": 2**40}, "stability_threshold must be at most 1024"),
        ({"max_steps": True}, "max_steps must be a positive integer, got True"),
        ({"entropy_bound": "0.1"}, "entropy_bound must be a finite number of at least 0"),
        ({"soft_embedding_top_k": 4}, "soft_embedding_top_k must be 0 for all ids, or an integer"),
        ({"head_memory_mb": 0}, "head_memory_mb must be a positive integer, got 0"),
        ({"head_memory_mb": True}, "head_memory_mb must be a positive integer, got True"),
        ({"head_memory_mb": "1GB"}, "head_memory_mb must be a positive integer, got '1GB'"),
        (
            {"head_weights": "int4"},
            "head_weights must be one of exact, int8, fp8, nvfp4, got 'int4'",
        ),
        ({"head_weights": None}, "head_weights must be one of exact, int8, fp8, nvfp4, got None"),
        ({"head_weights": ["fp8"]}, "got ['fp8']"),
        ({"fused_commit": "on"}, "fused_commit must be a boolean (or 0/1), got 'on'"),
        (
            {"t_max": 0},
            "t_max must be a finite number of at least 1e-06 (logits are divided by it), got 0",
        ),
        ({"t_min": 0.9}, "t_max (0.8) must not be below t_min (0.9)"),
    ],
)
def test_engine_options_that_make_no_sense(additional: object, problem: str):
    assert problem in refusal_of(additional=additional)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ({"max_steps": 3}, "names max_steps, which a generation config calls max_denoising_steps"),
        ({"entropy_bound": 3}, "a generation config calls sampler_config.entropy_bound"),
        ({"doubt_threshold": 0.1}, "names doubt_threshold, which no published rule has"),
        ({"sampler_config": {"bound": 1}}, "sampler_config has no bound; accepted: entropy_bound"),
    ],
)
def test_overrides_that_would_do_nothing(override: dict[str, Any], problem: str):
    assert problem in refusal_of(override=override)


PUBLISHED_REVEAL = {"max_steps": 4, "reveal_threshold": 0.85, "reveal_by": "drawn"}


def reveal_rules(generation: dict[str, Any] | None = None, **options: Any) -> ServedRules:
    options = {"published": PUBLISHED_REVEAL, **options}
    return served_rules(generation or {}, source="x", kind=RevealConstants, **options)[0]


def test_a_family_names_what_no_file_of_its_checkpoints_says():
    rules, origins = served_rules(
        {"eos_token_id": 3}, source="x", kind=RevealConstants, published=PUBLISHED_REVEAL
    )
    assert rules.default == rules.presets[REFERENCE] == RevealConstants(**PUBLISHED_REVEAL)
    assert origins == {}
    assert rules.presets["fast"] == RevealConstants(
        max_steps=4, reveal_threshold=0.7, reveal_by="model"
    )
    read = ServedRules.from_dict(json.loads(json.dumps(rules.to_dict())))
    assert read == rules


def test_everything_else_wins_over_what_a_family_names():
    said = {"max_denoising_steps": 8, "reveal_by": "margin"}
    assert reveal_rules(said).default == RevealConstants(
        max_steps=8, reveal_threshold=0.85, reveal_by="margin"
    )
    assert reveal_rules(said, override={"reveal_by": "model"}).default.reveal_by == "model"
    assert reveal_rules(said, max_denoising_steps=3).default.max_steps == 3
    ours = {"preset": "balanced", "max_steps": 9}
    served = reveal_rules(said, additional=ours)
    assert served.default == RevealConstants(max_steps=9, reveal_threshold=0.9, reveal_by="model")
    assert served.presets[REFERENCE].max_steps == 8


def test_what_neither_checkpoint_nor_family_says_is_missing():
    with pytest.raises(CheckpointError) as caught:
        reveal_rules(published={"max_steps": 4, "reveal_by": "luck"})
    assert "reveal_threshold is missing" in str(caught.value)
    assert "reveal_by must be one of drawn, model, entropy" in str(caught.value)


def test_options_of_another_rule_are_refused():
    with pytest.raises(ConfigError) as caught:
        reveal_rules(additional={"t_max": 0.5, "reveal_by": "first"})
    assert "has no 't_max'; accepted: preset, max_steps, reveal_threshold" in str(caught.value)
    assert "reveal_by must be one of drawn, model, entropy, margin" in str(caught.value)


def test_a_threshold_needs_a_probability():
    with pytest.raises(ConfigError) as caught:
        reveal_rules(additional={"reveal_by": "entropy"})
    assert "reveal_threshold (0.85) needs reveal_by to be one of drawn, model" in str(caught.value)
    assert reveal_rules(additional={"reveal_by": "random", "reveal_threshold": 0}).default
    # The presets stay in reach: they name the confidence that they are about.
    assert reveal_rules(additional={"reveal_by": "leftmost", "reveal_threshold": 0}).presets["fast"]


@for_each(kind=PRESETS)
def test_every_kind_of_rule_has_the_same_presets(kind: str):
    assert tuple(PRESETS[kind]) == preset_names()


def test_one_message_names_what_is_wrong_in_every_place():
    with pytest.raises(CheckpointError) as caught:
        served_rules(
            changed(t_min=None),
            source="generation config of /models/tiny",
            override={"t_max": "hot", "max_steps": 3},
            max_denoising_steps=0,
            additional={"preset": "quick", "max_step": 3, "entropy_bound": -1},
        )
    for problem in (
        "t_min is missing",
        "t_max must be a finite number of at least 1e-06 (logits are divided by it), got 'hot'",
        "max_denoising_steps must be a positive integer, got 0",
        "names max_steps",
        "preset must be one of",
        "has no 'max_step'",
        "entropy_bound must be a finite number of at least 0",
    ):
        assert problem in str(caught.value)
