"""Presets and engine-wide options in a running engine: the rule that a request is denoised by."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_diffusion.denoise.presets import PRESETS, REFERENCE
from vllm_diffusion.engine import carriers

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm import LLM

    from vllm_diffusion.engine.model_state import CanvasModelState

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS = 32
BY_NAME = PRESETS["entropy_bound"]
PROMPT = [300, 17, 44, 300, 90, 21]

# `fast` is laid over these; a request that names a preset is not denoised by `fast`.
ENGINE_WIDE: dict[str, Any] = {
    "additional_config": {
        "diffusion": {"preset": "fast", "max_steps": 9, "stability_threshold": 3}
    },
    "override_generation_config": {"t_max": 0.9, "temperature": 0.0, "max_new_tokens": 11},
}
# What the same means to an engine without options, as far as its requests may say it.
IN_WORDS = {"max_steps": 9, "t_max": 0.9, "stability_threshold": 1, **BY_NAME["fast"]}


def options(**values: Any) -> dict[str, Any]:
    return {"extra_args": {f"diffusion_{name}": value for name, value in values.items()}}


def answers(llm: LLM, *requests: dict[str, Any]) -> list[list[int]]:
    """Token ids of requests that run together, two canvases each."""
    wanted = {"max_tokens": 2 * CANVAS, "ignore_eos": True, "seed": 3}
    outputs = llm.generate(
        [{"prompt_token_ids": PROMPT}] * len(requests),
        [SamplingParams(**wanted, **request) for request in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def steps_of(llm: LLM, **request: Any) -> int:
    """Forwards of two canvases; their commits take none of their own."""
    names = ("vllm:diffusion_num_denoising_steps", "vllm:diffusion_num_denoising_steps_total")

    def counted() -> float:
        return sum(metric.value for metric in llm.get_metrics() if metric.name in names)

    before = counted()
    answers(llm, request)
    return int(counted() - before)


def state_of(llm: LLM) -> CanvasModelState:
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    state: CanvasModelState = executor.driver_worker.worker.model_runner.model_state
    return state


# ---- an engine without options ----


def test_a_preset_is_the_options_that_it_stands_for(engine: Callable[..., LLM]) -> None:
    llm = engine()
    (plain,) = answers(llm, {})
    assert answers(llm, options(preset=REFERENCE)) == [plain]
    for name, constants in BY_NAME.items():
        assert answers(llm, options(preset=name)) == answers(llm, options(**constants))


@pytest.mark.parametrize("name", BY_NAME)
def test_the_rule_of_a_preset_reaches_the_slot_that_it_is_served_in(
    engine: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    llm = engine()
    state, slots = state_of(llm), []
    admit = state.pool.admit
    monkeypatch.setattr(
        state.pool, "admit", lambda slot, **of: (slots.append(slot), admit(slot, **of))
    )
    assert len(answers(llm, options(preset=name))[0]) == 2 * CANVAS
    (slot,) = slots
    held = {
        constant: float(getattr(state.pool.constants, constant)[slot])
        for constant in ("entropy_bound", "hold_threshold", "doubt_threshold")
    }
    rule = asdict(state.rules.presets[name])
    assert held == pytest.approx({constant: rule[constant] for constant in held})
    assert rule == asdict(state.rules.default) | BY_NAME[name]


def test_a_preset_changes_the_steps_of_its_request_and_nothing_of_its_neighbours(
    engine: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine()
    # A rule that differs in every constant, whatever the shipped presets are.
    config = llm.llm_engine.model_config.hf_config
    served = carriers.served(config)
    rule = {"max_steps": 5, "t_min": 0.1, "t_max": 0.7, "entropy_bound": 2.0}
    fast = replace(served.rules.default, **rule)
    rules = replace(served.rules, presets=served.rules.presets | {"fast": fast})
    monkeypatch.setattr(config, "vllm_diffusion", replace(served, rules=rules).to_dict())
    crowd = [{}, options(preset="fast"), options(preset=REFERENCE), options(preset="fast")]
    alone = [answers(llm, request)[0] for request in crowd]
    assert answers(llm, *crowd) == alone
    assert alone[0] == alone[2] != alone[1] == alone[3]
    assert steps_of(llm, **options(preset="fast")) == 2 * 5
    assert steps_of(llm, **options(preset="fast", max_steps=3)) == 2 * 3
    assert steps_of(llm) > 2 * 5


def test_an_unknown_preset_is_refused_with_the_known_ones(engine: Callable[..., LLM]) -> None:
    llm = engine()
    with pytest.raises(VLLMValidationError, match="diffusion_preset must be one of reference, "):
        answers(llm, options(preset="quick"))
    assert answers(llm, {}) == answers(llm, options(preset=REFERENCE))


# ---- an engine with options ----


def test_engine_wide_options_are_the_options_of_every_request(engine: Callable[..., LLM]) -> None:
    expected = answers(engine(), options(**IN_WORDS))
    published = answers(engine(), options(t_max=0.9))
    llm = engine(**ENGINE_WIDE)
    assert answers(llm, options(stability_threshold=1)) == expected
    assert answers(llm, options(preset=REFERENCE)) == published
    assert expected != published


def test_a_request_may_ask_for_as_much_stability_as_is_remembered(
    engine: Callable[..., LLM],
) -> None:
    llm = engine(**ENGINE_WIDE)
    state = state_of(llm)
    assert state.pool.history.shape[1] == 3
    # Any two steps agree where one id alone may be said: the canvas ends as soon as it may.
    surely = {"allowed_token_ids": [7], "temperature": 1.0}
    # Without the doubt of `fast`, which would be gone in the first step.
    asked = {held: options(stability_threshold=held, doubt_threshold=0.0) for held in range(4)}
    forwards = {held: steps_of(llm, **surely, **asked[held]) for held in range(4)}
    assert forwards == {held: 2 * (held + 1) for held in range(4)}
    assert steps_of(llm, **surely, **options(doubt_threshold=0.0)) == forwards[3]
    assert steps_of(llm, **surely) == forwards[0], "the engine's doubt threshold did not arrive"
    assert steps_of(llm, **surely, **options(preset=REFERENCE)) == forwards[1]
    with pytest.raises(VLLMValidationError, match="at most the served 3, got 4"):
        answers(llm, options(stability_threshold=4))


def test_a_request_without_sampling_parameters_gets_the_recommended_ones(
    engine: Callable[..., LLM],
) -> None:
    llm = engine(**ENGINE_WIDE)
    recommended = SamplingParams(temperature=0.0, max_tokens=11)
    prompt = {"prompt_token_ids": PROMPT}
    plain, named, other = (
        llm.generate(prompt, sampling, use_tqdm=False)[0].outputs[0].token_ids
        for sampling in (None, recommended, SamplingParams(temperature=1.0, max_tokens=11, seed=5))
    )
    assert len(plain) == 11, "vLLM's own max_tokens is 16"
    assert plain == named != other
