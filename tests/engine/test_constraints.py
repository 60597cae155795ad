"""A constraint from a request to the rows of its canvases and back."""

from __future__ import annotations

import gc
import re
import threading
from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.reasoning import ReasoningParserManager
from vllm.sampling_params import StructuredOutputsParams

from vllm_diffusion import step
from vllm_diffusion.constrain.automaton.walk import Walk
from vllm_diffusion.engine import carriers, sampler
from vllm_diffusion.engine.constraints.backend import ConstraintBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS, MAX_MODEL_LEN = 32, 512
LONG = "The capital of France is Paris, a city on the river Seine. " * 2
HASTY = {"diffusion_max_steps": 2}


@pytest.fixture
def seen() -> list[Any]:
    """The automata of every step."""
    return []


@pytest.fixture
def llm(
    engine: Callable[..., LLM], seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[LLM]:
    """The engine; after the test it serves as before it, and holds nothing."""
    llm = engine()

    def watched(*args: Any, automata: Any = (), **options: Any) -> Any:
        seen.append(automata)
        return step.advance(*args, automata=automata, **options)

    monkeypatch.setattr(sampler, "advance", watched)
    yield llm
    seen.clear()
    generate(llm, "hello", max_tokens=4)
    inside = Inside(llm)
    inside.assert_idle()
    # The worker learns of the last end with the next step.
    generate(llm, "hello", max_tokens=4)
    assert len(inside.model_state.automata) == 0
    gc.collect()
    assert not inside.model_state.automata._shared


def generate(llm: LLM, prompt: Any, *, choice: list[str] | None = None, **sampling: Any) -> Any:
    asked = None if choice is None else StructuredOutputsParams(choice=choice)
    wanted = {"max_tokens": 2 * CANVAS, "structured_outputs": asked} | sampling
    return llm.generate(prompt, parameters(**wanted), use_tqdm=False)


def parameters(*, extra_args: dict[str, Any] | None = None, **sampling: Any) -> SamplingParams:
    """Of a request that takes few steps."""
    return SamplingParams(**{"seed": 3} | sampling, extra_args=HASTY | (extra_args or {}))


def texts(outputs: Any) -> list[str]:
    return [each.outputs[0].text for each in outputs]


def test_the_answer_is_what_the_constraint_says(llm: LLM, seen: list[Any]) -> None:
    (output,) = generate(llm, "hello", choice=["yes", "no way"])
    assert output.outputs[0].text in {"yes", "no way"}
    assert output.outputs[0].finish_reason == "stop"
    assert all(len(automata) == 1 for automata in seen)


def test_a_text_goes_on_in_the_next_canvas(llm: LLM, seen: list[Any]) -> None:
    (output,) = generate(llm, "hello", choice=[LONG], max_tokens=100)
    assert output.outputs[0].text == LONG
    starts = [automata[0].start.item() for automata in seen if automata]
    assert len(set(starts)) > 1
    assert starts == sorted(starts)


# ---- transport ----


def test_requests_of_one_constraint_share_it_and_others_go_free(llm: LLM, seen: list[Any]) -> None:
    asked = [["yes"], None, ["no"], ["yes"]]
    sampling = [
        parameters(
            max_tokens=8,
            structured_outputs=None if choice is None else StructuredOutputsParams(choice=choice),
        )
        for choice in asked
    ]
    free = texts(generate(llm, "hello", max_tokens=8))
    answers = texts(llm.generate(["hello"] * 4, sampling, use_tqdm=False))
    assert answers == ["yes", *free, "no", "yes"]
    together = next(automata for automata in seen if sum(len(g.canvas) for g in automata) == 3)
    assert sorted(len(group.canvas) for group in together) == [1, 2]


def test_the_automaton_is_sent_once(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    state = Inside(llm).model_state
    add = type(state).add_request

    def spy(self: Any, index: int, new: Any) -> None:
        sent.append(carriers.named_constraint(new))
        add(self, index, new)

    monkeypatch.setattr(type(state), "add_request", spy)
    generate(llm, "hello", choice=[LONG], max_tokens=100)
    assert len([each for each in sent if each is not None]) == 1


def test_the_clients_parameters_stay_as_they_were(llm: LLM) -> None:
    sampling = parameters(
        max_tokens=8,
        structured_outputs=StructuredOutputsParams(choice=["yes"]),
        skip_clone=True,
    )
    for _ in range(2):
        assert texts(llm.generate("hello", sampling, use_tqdm=False)) == ["yes"]
    assert sampling.extra_args == HASTY


def test_a_preempted_request_goes_on_where_it_was(
    llm: LLM, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, preempted = Inside(llm).scheduler, []
    schedule = type(scheduler).schedule

    def preempt(self: Any, *args: Any) -> Any:
        done = [request for request in self.running if len(request.output_token_ids) >= CANVAS]
        if done and not preempted:
            walk = Walk(done[0].structured_output_request.grammar.automaton)
            given = list(done[0].output_token_ids)
            preempted.append(walk.through(walk.automaton.start, given))
            self.running.remove(done[0])
            self._preempt_request(done[0], 0.0)
            seen.append("preempted")
        return schedule(self, *args)

    monkeypatch.setattr(type(scheduler), "schedule", preempt)
    (output,) = generate(llm, "hello", choice=[LONG], max_tokens=100)
    assert output.outputs[0].text == LONG
    assert preempted
    behind = seen[seen.index("preempted") + 1 :]
    first = next(automata[0] for automata in behind if automata)
    assert first.start.item() == preempted[0]


def test_an_aborted_request_leaves_nothing(llm: LLM) -> None:
    sampling = parameters(max_tokens=100, structured_outputs=StructuredOutputsParams(choice=[LONG]))
    llm.llm_engine.add_request("gone", "hello", sampling)
    while len(Inside(llm).model_state.automata) == 0:
        llm.llm_engine.step()
    llm.llm_engine.abort_request(["gone"])
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


@pytest.mark.parametrize("fused", [True, False])
def test_tokens_left_are_counted_to_the_last(llm: LLM, seen: list[Any], *, fused: bool) -> None:
    generate(
        llm,
        {"prompt_token_ids": [300] * 10},
        choice=[LONG],
        max_tokens=100,
        extra_args={"diffusion_fused_commit": fused},
    )
    pairs = {(g.rows.item(), g.left.item()) for automata in seen for g in automata}
    assert max(left for _, left in pairs) == 100 - CANVAS
    assert all((left - 100) % CANVAS == 0 for rows, left in pairs if rows == CANVAS)


def test_n_answers_of_one_request(llm: LLM) -> None:
    (output,) = generate(llm, "hello", choice=["yes", "no"], n=3, temperature=1.0)
    assert {answer.text for answer in output.outputs} <= {"yes", "no"}
    assert len(output.outputs) == 3


def test_min_tokens_are_kept_where_the_constraint_has_longer_texts(llm: LLM) -> None:
    def answer(regex: str, **sampling: Any) -> Any:
        constraint = StructuredOutputsParams(regex=regex)
        return generate(llm, "hello", structured_outputs=constraint, **sampling)[0].outputs[0]

    assert len(answer("[a-d]*").token_ids) < 8, "nothing to keep"
    for least in (8, CANVAS + 8):
        patient = answer("[a-d]*", min_tokens=least)
        assert len(patient.token_ids) > least
        assert re.fullmatch("[a-d]+", patient.text)
    assert answer("yes", min_tokens=8).text == "yes"


# ---- vLLM's own net ----


def test_a_rule_that_breaks_the_constraint_ends_the_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disobey(*args: Any, automata: Any = (), **options: Any) -> Any:
        del automata
        return step.advance(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sampler, "advance", disobey)
        asked = [StructuredOutputsParams(choice=["yes"]), None]
        sampling = [parameters(max_tokens=8, structured_outputs=each) for each in asked]
        broken, free = llm.generate(["hello"] * 2, sampling, use_tqdm=False)
    assert broken.outputs[0].finish_reason == "error"
    assert free.outputs[0].finish_reason == "length"


def test_no_mask_is_ever_made(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = Inside(llm).scheduler

    def never(*args: Any) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(type(scheduler.structured_output_manager), "grammar_bitmask", never)
    assert texts(generate(llm, "hello", choice=["yes"])) == ["yes"]


def test_steps_go_on_while_a_constraint_compiles(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    held, compiled = threading.Event(), ConstraintBackend.compile_grammar

    def slowly(self: Any, *args: Any, **options: Any) -> Any:
        assert held.wait(30)
        return compiled(self, *args, **options)

    monkeypatch.setattr(ConstraintBackend, "compile_grammar", slowly)
    asked = [StructuredOutputsParams(choice=["yes"]), None]
    for name, each in zip(("slow", "free"), asked, strict=True):
        sampling = parameters(max_tokens=8, structured_outputs=each)
        llm.llm_engine.add_request(name, "hello", sampling)
    finished = []
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step()
        finished += [output.request_id for output in outputs if output.finished]
        if finished:
            held.set()
    assert finished == ["free", "slow"]


# ---- what an automaton would be too large for ----

TOO_LARGE = r"(a|b)*a(a|b){14}"
"""An automaton has to remember the last 15 letters, which a parser does not mind."""


def asked_too_much(llm: LLM, **sampling: Any) -> Any:
    constraint = StructuredOutputsParams(regex=TOO_LARGE)
    wanted = {"max_tokens": 2 * CANVAS, "structured_outputs": constraint} | sampling
    return llm.generate("hello", parameters(**wanted), use_tqdm=False)[0].outputs[0]


def test_a_parser_keeps_it(llm: LLM, seen: list[Any]) -> None:
    answer = asked_too_much(llm)
    assert re.fullmatch("[ab]+", answer.text)
    assert answer.finish_reason == "length" or re.fullmatch(TOO_LARGE, answer.text)
    assert not any(seen), "no automaton"
    assert asked_too_much(llm).token_ids == answer.token_ids


def test_a_parser_begins_again_behind_what_a_preempted_request_wrote(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = asked_too_much(llm, max_tokens=12).token_ids
    scheduler, preempted = Inside(llm).scheduler, []
    schedule = type(scheduler).schedule

    def preempt(self: Any, *args: Any) -> Any:
        done = [request for request in self.running if len(request.output_token_ids) >= 3]
        if done and not preempted:
            preempted.append(done[0])
            self.running.remove(done[0])
            self._preempt_request(done[0], 0.0)
        return schedule(self, *args)

    monkeypatch.setattr(type(scheduler), "schedule", preempt)
    assert asked_too_much(llm, max_tokens=12).token_ids == whole
    assert preempted


def test_what_a_parser_cannot_promise_is_refused(llm: LLM) -> None:
    seed = [5] * CANVAS
    message = refusal(
        llm,
        structured_outputs=StructuredOutputsParams(regex=TOO_LARGE),
        allowed_token_ids=[300],
        extra_args={"diffusion_seed_canvas": seed, "diffusion_pinned": [0]},
    )
    assert "diffusion_pinned cannot be promised" in message
    assert "allowed_token_ids cannot be promised" in message


# ---- refusals ----


def refusal(llm: LLM, prompt: Any = "hello", **sampling: Any) -> str:
    with pytest.raises(VLLMValidationError) as caught:
        generate(llm, prompt, **sampling)
    return str(caught.value)


def test_everything_that_is_wrong_in_one_message(llm: LLM) -> None:
    message = refusal(
        llm,
        choice=[LONG],
        max_tokens=8,
        bad_words=["diffusion language"],
        thinking_token_budget=3,
        extra_args={"diffusion_max_steps": 0, "diffusion_template": ["a", 3]},
    )
    for problem in (
        "bad_words of several tokens",
        "thinking_token_budget=3",
        "diffusion_max_steps must be a positive integer, got 0",
        "diffusion_template and suffix",
        "leave 8",
    ):
        assert problem in message


def test_a_text_longer_than_what_may_be_written(llm: LLM) -> None:
    tokens = len(llm.get_tokenizer().encode(LONG, add_special_tokens=False))
    message = refusal(llm, choice=[LONG], max_tokens=tokens - 1)
    assert f"has {tokens} tokens" in message
    assert f"leave {tokens - 1}" in message
    assert texts(generate(llm, "hello", choice=[LONG], max_tokens=tokens)) == [LONG]


def test_a_text_longer_than_the_room_behind_the_prompt(llm: LLM) -> None:
    tokens = len(llm.get_tokenizer().encode(LONG, add_special_tokens=False))
    prompt = {"prompt_token_ids": [300] * (MAX_MODEL_LEN - tokens + 1)}
    assert f"leave {tokens - 1}" in refusal(llm, prompt, choice=[LONG], max_tokens=None)
    prompt["prompt_token_ids"].pop()
    assert texts(generate(llm, prompt, choice=[LONG], max_tokens=None)) == [LONG]


@pytest.mark.parametrize("allowed", [True, False])
def test_pins_the_constraint_has_no_text_for(llm: LLM, *, allowed: bool) -> None:
    tokens = llm.get_tokenizer().encode("yes", add_special_tokens=False)
    seed = [*tokens, *[5] * (CANVAS - len(tokens))]
    seed[0] = tokens[0] if allowed else 300
    extra = {"diffusion_seed_canvas": seed, "diffusion_pinned": [0]}
    if allowed:
        assert texts(generate(llm, "hello", choice=["yes"], extra_args=extra)) == ["yes"]
    else:
        message = refusal(llm, choice=["yes"], extra_args=extra)
        assert "no text of the constraint has the tokens that diffusion_pinned holds" in message


def test_allowed_ids_restrict_a_constraint(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    allowed = tokenizer.encode("no", add_special_tokens=False)
    asked = {"choice": ["yes", "no", "y"], "allowed_token_ids": allowed}
    for seed in range(3):
        assert texts(generate(llm, "hello", seed=seed, **asked)) == ["no"]
    asked["choice"] = ["yes"]
    assert "can be written with allowed_token_ids" in refusal(llm, **asked)


@pytest.fixture
def reasoning(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the engine have the reasoning parser of a name."""
    manager = Inside(llm).scheduler.structured_output_manager
    config = llm.llm_engine.vllm_config.structured_outputs_config

    def have(name: str) -> None:
        parser = ReasoningParserManager.get_reasoning_parser(name)
        monkeypatch.setattr(config, "reasoning_parser", name)
        monkeypatch.setattr(manager, "reasoner_cls", parser)

    return have


def test_a_reasoning_parser_that_fits_no_token_of_the_model(
    llm: LLM, reasoning: Callable[[str], None]
) -> None:
    for name, why in (("deepseek_r1", "think start/end tokens"), ("hf", "response_template")):
        reasoning(name)
        message = refusal(llm, choice=["yes"])
        assert f"reasoning parser {name!r}" in message
        assert why in message
    assert generate(llm, "hello", max_tokens=4), "others go on"
    reasoning("gemma4")
    assert texts(generate(llm, "hello", choice=["yes"])) == ["yes"]


def test_a_request_says_what_its_white_space_is(llm: LLM) -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 3, "maxItems": 3}
    for options, text in (
        ({"disable_any_whitespace": True}, "[1,1,1]"),
        ({"whitespace_pattern": " "}, "[ 1 , 1 , 1 ]"),
    ):
        asked = StructuredOutputsParams(json=schema, **options)
        assert texts(generate(llm, "hello", structured_outputs=asked)) == [text]


def test_what_vllm_would_refuse_is_refused_too(llm: LLM) -> None:
    assert "cannot be an empty list" in refusal(llm, choice=[])


def test_without_a_tokenizer_there_are_no_constraints(llm: LLM) -> None:
    config = llm.llm_engine.vllm_config
    sampling = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes"]))
    with pytest.raises(VLLMValidationError, match="requires a tokenizer"):
        sampling._validate_structured_outputs(
            config.model_config, config.structured_outputs_config, None
        )
