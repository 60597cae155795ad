"""What a request may set: the options it gets, and the one message when something is wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.cases import for_each
from helpers.sampling import CONSTRAINT, FAST, RULE, RULES, Sampling

from vllm_diffusion.denoise.constants import MAX_STEPS, RevealConstants, ServedRules
from vllm_diffusion.denoise.presets import preset_names
from vllm_diffusion.errors import ParamsError
from vllm_diffusion.family import Text
from vllm_diffusion.request.options import DiffusionParams, read_options, requested_rule
from vllm_diffusion.request.parse import parse_params

REFUSED: dict[str, Any] = {
    "thinking_token_budget": 0,
    "trace_decode_token_ids": [1],
}

REVEAL = RevealConstants(max_steps=4, reveal_threshold=0.85, reveal_by="drawn")

OPTIONS = (
    "diffusion_preset, "
    "diffusion_canvas_length, diffusion_max_steps, "
    "diffusion_t_min, diffusion_t_max, diffusion_entropy_bound, diffusion_confidence_threshold, "
    "diffusion_stability_threshold, diffusion_hold_threshold, diffusion_doubt_threshold, "
    "diffusion_soft_embedding_top_k, "
    "diffusion_seed_canvas, diffusion_pinned, diffusion_read_only, diffusion_constrained, "
    "diffusion_fused_commit, diffusion_approximate_prefix, diffusion_telemetry, "
    "diffusion_template, diffusion_suffix, diffusion_draft, diffusion_noise_level"
)


def message_of(sampling: Sampling, canvas_length: int | None = 32) -> str:
    with pytest.raises(ParamsError) as caught:
        parse_params(sampling, canvas_length=canvas_length, vocab_size=100, rules=RULES)
    return str(caught.value)


def test_a_default_request_leaves_every_option_to_the_engine():
    assert parse_params(Sampling(), canvas_length=32) == DiffusionParams()


def test_options_become_fields():
    extra = {
        "diffusion_preset": "fast",
        "diffusion_max_steps": 7,
        "diffusion_canvas_length": 3,
        "diffusion_t_min": 0,
        "diffusion_t_max": 0.5,
        "diffusion_entropy_bound": 0.0,
        "diffusion_confidence_threshold": 1.5,
        "diffusion_hold_threshold": 0.9,
        "diffusion_doubt_threshold": 0.25,
        "diffusion_stability_threshold": 0,
        "diffusion_soft_embedding_top_k": 16,
        "diffusion_seed_canvas": [4, 5, 6],
        "diffusion_pinned": [0, 2],
        "diffusion_read_only": 1,
        "diffusion_constrained": False,
        "diffusion_fused_commit": 0,
        "diffusion_telemetry": 1,
    }
    parsed = parse_params(Sampling(extra_args=extra), canvas_length=32, vocab_size=100, rules=RULES)
    assert read_options(extra) == (parsed, [])
    assert parsed == DiffusionParams(
        preset="fast",
        canvas_length=3,
        constants={
            "max_steps": 7,
            "t_min": 0,
            "t_max": 0.5,
            "entropy_bound": 0.0,
            "confidence_threshold": 1.5,
            "hold_threshold": 0.9,
            "doubt_threshold": 0.25,
            "stability_threshold": 0,
            "soft_embedding_top_k": 16,
        },
        seed_canvas=(4, 5, 6),
        pinned=(0, 2),
        read_only=True,
        fused_commit=False,
        telemetry=True,
        constrained=False,
    )


def test_arguments_of_other_plugins_pass():
    sampling = Sampling(extra_args={"kv_transfer_params": {"a": 1}, "max_steps": "many"})
    assert parse_params(sampling, canvas_length=32) == DiffusionParams()


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_without_meaning_on_a_canvas_is_refused_by_name(name: str):
    message = message_of(replace(Sampling(), **{name: REFUSED[name]}))
    assert name in message
    assert not [other for other in REFUSED if other not in name and f"{other}=" in message]


def test_one_message_names_every_problem_and_the_way_out():
    extra = {
        "diffusion_max_steps": 0,
        "diffusion_canvas_length": 33,
        "diffusion_temprature": 0.5,
    }
    message = message_of(replace(Sampling(), **REFUSED, extra_args=extra))
    for name, value in REFUSED.items():
        assert f"{name}={value!r}" in message
    assert "leave them at their defaults" in message
    assert "diffusion_max_steps must be a positive integer, got 0" in message
    assert "served canvas of 32, got 33" in message
    assert "'diffusion_temprature'" in message
    assert f"accepted: {OPTIONS}" in message


@for_each(value=[0, -1, 1.5, 8.0, "8", True, None, [8], {"steps": 8}])
@pytest.mark.parametrize("option", ["diffusion_max_steps", "diffusion_canvas_length"])
def test_only_positive_integers_are_counts(option: str, value: object):
    message = message_of(Sampling(extra_args={option: value}))
    assert f"{option} must be a positive integer, got {value!r}" in message


def test_a_canvas_as_wide_as_the_served_one_passes_and_one_wider_does_not():
    wide = Sampling(extra_args={"diffusion_canvas_length": 32})
    assert parse_params(wide, canvas_length=32).canvas_length == 32
    assert "served canvas of 31, got 32" in message_of(wide, canvas_length=31)


@for_each(value=[MAX_STEPS + 1, 2**63, 2**64 - 1])
def test_steps_without_bound_are_refused(value: int):
    # 2**63 fits vLLM's message and no tensor: it would end the engine.
    message = message_of(Sampling(extra_args={"diffusion_max_steps": value}))
    assert f"diffusion_max_steps must be at most {MAX_STEPS}, got {value}" in message
    most = Sampling(extra_args={"diffusion_max_steps": MAX_STEPS})
    assert parse_params(most).constants == {"max_steps": MAX_STEPS}


def test_any_width_passes_where_the_served_canvas_is_not_known():
    wide = Sampling(extra_args={"diffusion_canvas_length": 10**6})
    assert parse_params(wide).canvas_length == 10**6


def test_a_long_value_does_not_fill_the_message():
    bias = dict.fromkeys(range(300), float("nan"))
    extra = {"diffusion_max_steps": "x" * 10_000}
    message = message_of(Sampling(logit_bias=bias, extra_args=extra))
    assert "logit_bias must be finite" in message
    assert "diffusion_max_steps" in message
    assert len(message) < 500


def test_the_request_is_not_changed():
    extra = {"diffusion_max_steps": 7, "other": [1]}
    parse_params(Sampling(extra_args=extra), canvas_length=32)
    assert extra == {"diffusion_max_steps": 7, "other": [1]}


def test_what_is_well_formed_is_read_whatever_else_is_wrong():
    read, problems = read_options({"diffusion_max_steps": 7, "diffusion_unheard_of": 1, "x": 2})
    assert read == DiffusionParams(constants={"max_steps": 7})
    assert len(problems) == 1
    assert read_options({}) == (DiffusionParams(), [])


@for_each(
    option=[
        "diffusion_t_min",
        "diffusion_t_max",
        "diffusion_entropy_bound",
        "diffusion_confidence_threshold",
        "diffusion_hold_threshold",
        "diffusion_doubt_threshold",
    ],
    value=[-0.1, "0.5", True, None, float("nan"), float("inf"), [0.5]],
)
def test_only_finite_numbers_are_thresholds(option: str, value: object):
    assert f"{option} must be a finite number" in message_of(Sampling(extra_args={option: value}))


@for_each(value=[1e7, 10**30, 10**400, 3.5e38, float("inf")])
def test_numbers_that_fp32_cannot_hold_are_no_thresholds(value: float):
    # They would end the engine: a tensor cannot be filled with them.
    message = message_of(Sampling(extra_args={"diffusion_entropy_bound": value}))
    assert "diffusion_entropy_bound must be a finite number of at most 1e+06" in message
    parse_params(Sampling(extra_args={"diffusion_entropy_bound": 1e6}))


@for_each(value=[0.0, 1e-300, 9e-7])
def test_nothing_is_divided_by_next_to_nothing(value: float):
    # What fp32 makes of the quotients is no number, and from a canvas it would get into the cache.
    message = message_of(
        Sampling(extra_args={"diffusion_t_max": value}, repetition_penalty=value or 1e300)
    )
    expected = "a finite number of at least 1e-06 (logits are divided by it)"
    assert f"diffusion_t_max must be {expected}, got {value}" in message
    assert "repetition_penalty must be 1e-06 to 1e+06, got " in message


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"diffusion_stability_threshold": 3}, "at most the served 2, got 3"),
        ({"diffusion_stability_threshold": -1}, "an integer of at least 0, got -1"),
        ({"diffusion_soft_embedding_top_k": 7}, "an integer from 8 to 64, got 7"),
        ({"diffusion_soft_embedding_top_k": 65}, "0 for all ids, or an integer from 8 to 64"),
        ({"diffusion_soft_embedding_top_k": True}, "an integer from 8 to 64, got True"),
        ({"diffusion_t_min": 0.9}, "diffusion_t_max (0.8) must not be below diffusion_t_min (0.9)"),
        ({"diffusion_preset": "fast", "diffusion_t_min": 0.7}, "diffusion_t_max (0.6) must not be"),
        ({"diffusion_preset": "quick"}, f"one of {', '.join(preset_names())}, got 'quick'"),
        ({"diffusion_preset": 1}, "got 1"),
        ({"diffusion_preset": ["fast"]}, "got ['fast']"),
        ({"diffusion_t_max": 0.3}, "diffusion_t_max (0.3) must not be below diffusion_t_min (0.4)"),
        ({"diffusion_seed_canvas": [1] * 31}, "exactly 32 ids, got 31"),
        ({"diffusion_seed_canvas": [1], "diffusion_canvas_length": 2}, "exactly 2 ids, got 1"),
        ({"diffusion_seed_canvas": [99, 100] * 16}, "ids must be below 100, got 100"),
        ({"diffusion_seed_canvas": []}, "a list of integers of at least 0"),
        ({"diffusion_seed_canvas": "abc"}, "a list of integers of at least 0"),
        ({"diffusion_seed_canvas": [1, -1]}, "a list of integers of at least 0"),
        ({"diffusion_pinned": [0]}, "needs a diffusion_seed_canvas"),
        ({"diffusion_pinned": [True]}, "a list of integers of at least 0"),
        (
            {"diffusion_pinned": [32], "diffusion_seed_canvas": [1] * 32},
            "must lie inside the canvas of 32, got 32",
        ),
        (
            {"diffusion_pinned": [3, 20], "diffusion_seed_canvas": [1] * 32},
            "holds position 20, which max_tokens=16 cuts off",
        ),
        ({"diffusion_read_only": 2}, "diffusion_read_only must be a boolean (or 0/1), got 2"),
        ({"diffusion_read_only": "yes"}, "a boolean"),
        ({"diffusion_constrained": True}, "needs logprob_token_ids"),
    ],
)
def test_options_that_cannot_be_honoured(extra: dict[str, Any], problem: str):
    assert problem in message_of(Sampling(extra_args=extra))


def test_constants_of_another_rule_are_refused_by_its_name():
    extra = {"diffusion_reveal_by": "margin", "diffusion_max_steps": 3, "diffusion_t_min": 0.9}
    message = message_of(Sampling(extra_args=extra))
    assert "diffusion_reveal_by: not of this model's decoding rule, entropy_bound" in message
    assert "which has diffusion_max_steps, diffusion_t_min" in message
    assert "reveal_threshold" not in message

    served = ServedRules(default=REVEAL, presets={})
    extra = {"diffusion_t_min": 0.4, "diffusion_entropy_bound": 0.1, "diffusion_reveal_by": "model"}
    with pytest.raises(ParamsError) as caught:
        parse_params(Sampling(extra_args=extra), rules=served)
    assert str(caught.value) == (
        "diffusion_t_min, diffusion_entropy_bound: not of this model's decoding rule, reveal, "
        "which has diffusion_max_steps, diffusion_reveal_threshold, diffusion_reveal_by"
    )


def test_constants_of_the_served_rule_are_read_whatever_the_rule():
    served = ServedRules(default=REVEAL, presets={"fast": replace(REVEAL, reveal_threshold=0.5)})
    extra = {"diffusion_reveal_by": "margin", "diffusion_preset": "fast", "diffusion_max_steps": 3}
    params = parse_params(Sampling(extra_args=extra), rules=served)
    assert requested_rule(params, served) == RevealConstants(
        max_steps=3, reveal_threshold=0.5, reveal_by="margin"
    )
    with pytest.raises(ParamsError, match=r"reveal_by must be one of drawn, model, .*got 'luck'"):
        parse_params(Sampling(extra_args={"diffusion_reveal_by": "luck"}), rules=served)
    with pytest.raises(ParamsError, match=r"reveal_by must be one of drawn, model, .*got 1"):
        parse_params(Sampling(extra_args={"diffusion_reveal_by": 1}), rules=served)
    extra = {"diffusion_reveal_by": "entropy"}
    with pytest.raises(ParamsError) as caught:
        parse_params(Sampling(extra_args=extra), rules=served)
    assert str(caught.value) == (
        "diffusion_reveal_threshold (0.85) needs diffusion_reveal_by to be one of drawn, model, "
        "margin, got entropy; served are 0.85 and drawn"
    )
    with pytest.raises(ParamsError) as caught:
        parse_params(Sampling(extra_args={"diffusion_pace": 1}), rules=served)
    assert "diffusion_reveal_by" in str(caught.value)
    assert "entropy_bound" not in str(caught.value)


def test_a_read_is_one_canvas_long_whatever_max_tokens_says():
    extra = {
        "diffusion_seed_canvas": [1] * 32,
        "diffusion_pinned": [31],
        "diffusion_read_only": True,
    }
    parsed = parse_params(Sampling(extra_args=extra), canvas_length=32, vocab_size=100, rules=RULES)
    assert parsed.pinned == (31,)


def test_wishes_that_exclude_each_other():
    pins = {"diffusion_seed_canvas": [1, 2, 3], "diffusion_pinned": [0, 2]}
    message = message_of(
        Sampling(
            allowed_token_ids=[1, 5],
            min_tokens=4,
            all_stop_token_ids={1, 5, 6},
            extra_args=pins | {"diffusion_canvas_length": 3},
            logit_bias={4: float("inf")},
        )
    )
    assert "min_tokens=4 forbids every one of the allowed_token_ids" in message
    assert "diffusion_pinned holds tokens that are not allowed at [2]" in message
    assert "logit_bias must be finite, up to 1e+06, got {4: inf}" in message


def test_the_requested_rule_is_the_served_one_but_for_what_is_named():
    assert requested_rule(DiffusionParams(), RULES) == RULE
    named = DiffusionParams(constants={"max_steps": 3, "t_min": 0.0, "stability_threshold": 0})
    changes = {"max_steps": 3, "t_min": 0.0, "stability_threshold": 0}
    assert requested_rule(named, RULES) == replace(RULE, **changes)
    assert requested_rule(replace(named, preset="fast"), RULES) == replace(FAST, **changes)


def test_a_constraint_passes() -> None:
    assert parse_params(Sampling(structured_outputs=CONSTRAINT)) == DiffusionParams()


@pytest.mark.parametrize("option", [{"template": ["a", 3]}, {"suffix": "b"}])
def test_a_constraint_and_fixed_text_both_say_what_the_answer_is(option: dict[str, Any]) -> None:
    extra = {f"diffusion_{name}": value for name, value in option.items()}
    assert "keep one" in message_of(Sampling(structured_outputs=CONSTRAINT, extra_args=extra))
    parse_params(Sampling(extra_args=extra))
    parse_params(Sampling(structured_outputs=CONSTRAINT, extra_args={"diffusion_draft": "a"}))


def test_ids_that_no_text_may_hold_are_not_all_that_may_be_said() -> None:
    def message(**asked: Any) -> str:
        with pytest.raises(ParamsError) as caught:
            parse_params(Sampling(**asked), canvas_length=2, vocab_size=100, banned=(3,))
        return str(caught.value)

    assert "of the allowed ids [3] this model may say none" in message(allowed_token_ids=[3])
    left = message(allowed_token_ids=[3, 9], min_tokens=1, all_stop_token_ids={9})
    assert "min_tokens=1 forbids every one" in left
    read = {"extra_args": {"diffusion_constrained": True}, "logprob_token_ids": [3]}
    assert "of the allowed ids [3] this model may say none" in message(**read)
    pins = {"diffusion_seed_canvas": [3, 9], "diffusion_pinned": [0, 1]}
    assert "not allowed at [0]" in message(extra_args=pins)
    assert parse_params(Sampling(allowed_token_ids=[3, 9]), banned=(3,)) == DiffusionParams()


def test_a_seed_canvas_on_a_grid_may_be_narrower_than_a_block():
    def parsed(width: int) -> DiffusionParams:
        asked = Sampling(extra_args={"diffusion_seed_canvas": [4] * width})
        return parse_params(asked, canvas_length=8, vocab_size=100, text=Text.BLOCK)

    assert parsed(3).seed_canvas == (4, 4, 4)
    assert len(parsed(8).seed_canvas) == 8
    with pytest.raises(ParamsError, match="must hold at most 8 ids, got 9"):
        parsed(9)
