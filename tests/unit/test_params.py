"""What a request may set: the options it gets, and the one message when something is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_diffusion.errors import ParamsError
from vllm_diffusion.params import MAX_STEPS, DiffusionParams, admitted_params, parse_params


@dataclass(frozen=True)
class Sampling:
    """The attributes of vLLM's SamplingParams that the parser reads, at vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = field(default_factory=list)
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: Any = None
    structured_outputs: Any = None
    thinking_token_budget: int | None = None
    trace_decode_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None


NOT_DEFAULT: dict[str, Any] = {
    "temperature": 0.0,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "min_tokens": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {5: -100.0},
    "bad_words": ["no"],
    "allowed_token_ids": [1, 2],
    "logprobs": 0,
    "logprob_token_ids": [7],
    "prompt_logprobs": 0,
    "prompt_logprob_token_ids": [[1, 2]],
    "structured_outputs": SimpleNamespace(json="{}"),
    "thinking_token_budget": 0,
    "trace_decode_token_ids": [1],
}


def message_of(sampling: Sampling, canvas_length: int | None = 32) -> str:
    with pytest.raises(ParamsError) as caught:
        parse_params(sampling, canvas_length=canvas_length)
    return str(caught.value)


def test_a_default_request_leaves_every_option_to_the_engine():
    assert parse_params(Sampling(), canvas_length=32) == DiffusionParams()


def test_options_become_fields():
    sampling = Sampling(extra_args={"diffusion_max_steps": 7, "diffusion_canvas_length": 16})
    assert parse_params(sampling, canvas_length=32) == DiffusionParams(
        max_steps=7, canvas_length=16
    )


def test_arguments_of_other_plugins_pass():
    sampling = Sampling(extra_args={"kv_transfer_params": {"a": 1}, "max_steps": "many"})
    assert parse_params(sampling, canvas_length=32) == DiffusionParams()


@pytest.mark.parametrize("name", NOT_DEFAULT)
def test_a_parameter_without_meaning_on_a_canvas_is_refused_by_name(name: str):
    message = message_of(replace(Sampling(), **{name: NOT_DEFAULT[name]}))
    assert name in message
    assert not [other for other in NOT_DEFAULT if other not in name and f"{other}=" in message]


def test_one_message_names_every_problem_and_the_way_out():
    extra = {
        "diffusion_max_steps": 0,
        "diffusion_canvas_length": 33,
        "diffusion_temprature": 0.5,
    }
    message = message_of(replace(Sampling(), **NOT_DEFAULT, extra_args=extra))
    for name, value in NOT_DEFAULT.items():
        if name != "structured_outputs":
            assert f"{name}={value!r}" in message
    assert "response_format" in message
    assert "leave them at their defaults" in message
    assert "diffusion_max_steps must be a positive integer, got 0" in message
    assert "served canvas of 32, got 33" in message
    assert "'diffusion_temprature'" in message
    assert "accepted: diffusion_max_steps, diffusion_canvas_length" in message


@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, "8", True, None, [8], {"steps": 8}])
@pytest.mark.parametrize("option", ["diffusion_max_steps", "diffusion_canvas_length"])
def test_only_positive_integers_are_counts(option: str, value: object):
    message = message_of(Sampling(extra_args={option: value}))
    assert f"{option} must be a positive integer, got {value!r}" in message


def test_a_canvas_as_wide_as_the_served_one_passes_and_one_wider_does_not():
    wide = Sampling(extra_args={"diffusion_canvas_length": 32})
    assert parse_params(wide, canvas_length=32).canvas_length == 32
    assert "served canvas of 31, got 32" in message_of(wide, canvas_length=31)


@pytest.mark.parametrize("value", [MAX_STEPS + 1, 2**63, 2**64 - 1])
def test_steps_without_bound_are_refused(value: int):
    # 2**63 fits vLLM's message and no tensor: it would end the engine.
    message = message_of(Sampling(extra_args={"diffusion_max_steps": value}))
    assert f"diffusion_max_steps must be at most {MAX_STEPS}, got {value}" in message
    most = Sampling(extra_args={"diffusion_max_steps": MAX_STEPS})
    assert parse_params(most).max_steps == MAX_STEPS


def test_any_width_passes_where_the_served_canvas_is_not_known():
    wide = Sampling(extra_args={"diffusion_canvas_length": 10**6})
    assert parse_params(wide).canvas_length == 10**6


def test_a_long_value_does_not_fill_the_message():
    bias = dict.fromkeys(range(300), 1.0)
    extra = {"diffusion_max_steps": "x" * 10_000}
    message = message_of(Sampling(logit_bias=bias, extra_args=extra))
    assert "logit_bias=" in message
    assert "diffusion_max_steps" in message
    assert len(message) < 500


def test_the_request_is_not_changed():
    extra = {"diffusion_max_steps": 7, "other": [1]}
    parse_params(Sampling(extra_args=extra), canvas_length=32)
    assert extra == {"diffusion_max_steps": 7, "other": [1]}


def test_the_worker_reads_admitted_options_and_never_raises():
    admitted = admitted_params({"diffusion_max_steps": 7, "diffusion_unheard_of": 1, "x": 2})
    assert admitted == DiffusionParams(max_steps=7)
    assert admitted_params(None) == admitted_params({}) == DiffusionParams()
