"""How a request ends, wherever in a canvas that is, and what the next one finds.

Every answer is compared with one that runs to the end of its canvases: an early end cuts it and
changes nothing before the cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from helpers.parity import ENGINE, make_prompt
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_diffusion.denoise.constants import CONSTANTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM
    from vllm.outputs import CompletionOutput, RequestOutput

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS = 32
SLOTS = 8
MAX_MODEL_LEN = 512
PROMPT = "The quick brown fox jumps over the lazy dog"


@dataclass(frozen=True)
class Fresh:
    """The first answers of an engine that has served nobody before."""

    llm: LLM
    tokens: dict[int, list[int]]  # seed -> 96 tokens after PROMPT


@pytest.fixture(scope="module")
def fresh(engine_pool: EnginePool, parity_checkpoint: Path) -> Fresh:
    engine_pool.close()
    llm = engine_pool.get(parity_checkpoint, **ENGINE)
    # Both at once: the second of two in a row would be the next owner of the first one's slot.
    sampling = [SamplingParams(max_tokens=96, ignore_eos=True, seed=seed) for seed in (1, 2)]
    first, second = llm.generate([PROMPT, PROMPT], sampling, use_tqdm=False)
    return Fresh(llm, {1: tokens_of(first.outputs[0]), 2: tokens_of(second.outputs[0])})


@pytest.fixture
def llm(fresh: Fresh) -> Iterator[LLM]:
    """The engine, checked to be as empty after the test as before it."""
    yield fresh.llm
    Inside(fresh.llm).assert_idle()


def as_prompt(prompt: str | list[int]) -> Any:
    return prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt}


def run(llm: LLM, prompt: str | list[int] = PROMPT, **sampling: Any) -> CompletionOutput:
    """One request alone; 96 tokens whatever they are, unless told otherwise."""
    options: dict[str, Any] = {"max_tokens": 96, "ignore_eos": True, "seed": 1} | sampling
    (request,) = llm.generate(as_prompt(prompt), SamplingParams(**options), use_tqdm=False)
    assert request.finished
    return request.outputs[0]


def tokens_of(answer: CompletionOutput) -> list[int]:
    return list(answer.token_ids)


def first_new(tokens: list[int], position: int) -> tuple[int, int]:
    """(index, token): the first from a position on that has not occurred before."""
    return next(
        (index, tokens[index])
        for index in range(position, len(tokens))
        if tokens[index] not in tokens[:index]
    )


# ---- token limits ----


@pytest.mark.parametrize("limit", [1, 5, 31, 32, 33, 64, 70])
def test_max_tokens_cuts_the_answer_anywhere_in_a_canvas(llm: LLM, fresh: Fresh, limit: int):
    answer = run(llm, max_tokens=limit)
    assert tokens_of(answer) == fresh.tokens[1][:limit]
    assert answer.finish_reason == "length"
    assert answer.stop_reason is None


@pytest.mark.parametrize("left", [1, 2, 31, 32, 33, 50])
def test_max_model_len_inside_a_canvas_ends_the_answer_there(llm: LLM, left: int):
    prompt = make_prompt(MAX_MODEL_LEN - left)
    answer = run(llm, prompt)
    assert len(answer.token_ids) == left
    assert answer.finish_reason == "length"
    assert tokens_of(run(llm, prompt)) == tokens_of(answer), "the narrower canvas varies"


def test_the_canvas_before_the_narrow_one_is_not_changed_by_it(llm: LLM):
    prompt = make_prompt(MAX_MODEL_LEN - 50)
    assert tokens_of(run(llm, prompt))[:CANVAS] == tokens_of(run(llm, prompt, max_tokens=CANVAS))


def test_max_model_len_is_met_by_requests_in_one_batch_as_alone(llm: LLM):
    prompts = [make_prompt(MAX_MODEL_LEN - left) for left in (50, 9, 33)]
    alone = [tokens_of(run(llm, prompt)) for prompt in prompts]
    together = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(max_tokens=96, ignore_eos=True, seed=1),
        use_tqdm=False,
    )
    assert [list(request.outputs[0].token_ids) for request in together] == alone


# ---- stops ----


@pytest.mark.parametrize("position", [0, 7, 31, 32, 45, 80])
def test_a_stop_token_id_ends_the_answer_inside_a_canvas(llm: LLM, fresh: Fresh, position: int):
    index, token = first_new(fresh.tokens[1], position)
    answer = run(llm, stop_token_ids=[token])
    assert tokens_of(answer) == fresh.tokens[1][: index + 1]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == token


@pytest.mark.parametrize("position", [0, 40])
def test_end_tokens_of_checkpoint_and_tokenizer_stop_unless_ignored(
    llm: LLM, fresh: Fresh, monkeypatch: pytest.MonkeyPatch, position: int
):
    index, token = first_new(fresh.tokens[1], position)
    later = first_new(fresh.tokens[1], index + 1)[1]
    processor = llm.llm_engine.input_processor
    for of_checkpoint, of_tokenizer in ((token, later), (later, token)):
        monkeypatch.setattr(processor, "generation_config_fields", {"eos_token_id": of_checkpoint})
        monkeypatch.setattr(processor.renderer, "get_eos_token_id", lambda end=of_tokenizer: end)
        answer = run(llm, ignore_eos=False)
        assert tokens_of(answer) == fresh.tokens[1][: index + 1]
        assert answer.finish_reason == "stop"
        assert answer.text == llm.get_tokenizer().decode(
            fresh.tokens[1][:index], skip_special_tokens=True
        )
        assert tokens_of(run(llm, ignore_eos=True)) == fresh.tokens[1]


@pytest.mark.parametrize("position", [3, 28, 50])
def test_a_stop_string_cuts_the_text_inside_a_canvas(llm: LLM, fresh: Fresh, position: int):
    tokenizer = llm.get_tokenizer()
    text = run(llm).text
    # The first piece of text behind that position that has not occurred before.
    start = len(tokenizer.decode(fresh.tokens[1][:position], skip_special_tokens=True))
    stop = next(
        text[at : at + size]
        for at in range(start, len(text))
        for size in range(4, 12)
        if text.find(text[at : at + size]) == at
    )
    cut = text.index(stop)
    answer = run(llm, stop=[stop, "never in the text"])
    assert answer.text == text[:cut]
    assert answer.finish_reason == "stop"
    assert answer.stop_reason == stop
    kept = run(llm, stop=[stop], include_stop_str_in_output=True)
    assert kept.text == text[: cut + len(stop)]


def test_a_stop_string_may_span_two_canvases(llm: LLM, fresh: Fresh):
    tokenizer = llm.get_tokenizer()
    text = run(llm).text
    border = len(tokenizer.decode(fresh.tokens[1][:CANVAS], skip_special_tokens=True))
    stop = text[border - 3 : border + 3]
    assert text.index(stop) == border - 3, "not unique: choose another seed"
    assert run(llm, stop=stop).text == text[: border - 3]


def test_several_ends_take_the_first(llm: LLM, fresh: Fresh):
    early = first_new(fresh.tokens[1], 10)
    late = first_new(fresh.tokens[1], 40)
    answer = run(llm, stop_token_ids=[late[1], early[1]], max_tokens=60)
    assert tokens_of(answer) == fresh.tokens[1][: early[0] + 1]
    assert answer.stop_reason == early[1]
    answer = run(llm, stop_token_ids=[late[1]], max_tokens=late[0])
    assert len(answer.token_ids) == late[0]
    assert answer.finish_reason == "length"


# ---- one request's options ----


def test_a_canvas_of_its_own_width_ends_where_it_should(llm: LLM):
    width = {"diffusion_canvas_length": 7}
    answer = run(llm, extra_args=width, max_tokens=30)
    assert len(answer.token_ids) == 30
    assert tokens_of(run(llm, extra_args=width, max_tokens=9)) == tokens_of(answer)[:9]


@pytest.mark.parametrize("fused", [True, False])
def test_max_steps_bounds_the_forwards_of_a_canvas(llm: LLM, *, fused: bool):
    prompt = len(llm.get_tokenizer().encode(PROMPT, add_special_tokens=False))
    with Inside(llm).recorded_steps() as steps:
        wish = {"diffusion_max_steps": 3, "diffusion_fused_commit": fused}
        run(llm, extra_args=wish, max_tokens=64)
    # The prompt, then twice three denoising steps and a commit; or the first commit beside the
    # fourth step, and no second one.
    rows = [1, 1, 1, 2, 1, 1] if fused else [1] * 8
    assert [sum(step.values()) for step in steps] == [prompt, *(CANVAS * each for each in rows)]


def test_children_of_n_have_seeds_of_their_own_and_come_again(llm: LLM, fresh: Fresh):
    def children() -> list[list[int]]:
        (request,) = llm.generate(
            PROMPT,
            SamplingParams(n=3, max_tokens=96, ignore_eos=True, seed=1),
            use_tqdm=False,
        )
        return [tokens_of(answer) for answer in sorted(request.outputs, key=lambda o: o.index)]

    first = children()
    assert first[0] == fresh.tokens[1]
    assert first[1] == fresh.tokens[2], "vLLM gives child i the seed plus i"
    assert len({tuple(tokens) for tokens in first}) == 3
    assert children() == first


def test_requests_without_a_seed_differ(llm: LLM):
    assert tokens_of(run(llm, seed=None)) != tokens_of(run(llm, seed=None))


def test_any_64_bit_seed_is_its_own_and_comes_again(llm: LLM):
    seeds = [0, -2, 2**32, 2**32 + 1, 2**63 - 1, -(2**63)]
    answers = [tokens_of(run(llm, seed=seed, max_tokens=32)) for seed in seeds]
    assert len({tuple(tokens) for tokens in answers}) == len(seeds)
    assert [tokens_of(run(llm, seed=seed, max_tokens=32)) for seed in seeds] == answers


# ---- leaving in the middle ----


def start(llm: LLM, name: str, seed: int = 1, prompt: str | list[int] = PROMPT) -> None:
    sampling = SamplingParams(
        max_tokens=96, ignore_eos=True, seed=seed, output_kind=RequestOutputKind.CUMULATIVE
    )
    llm.llm_engine.add_request(name, as_prompt(prompt), sampling)


def steps(llm: LLM, count: int) -> list[RequestOutput]:
    return [output for _ in range(count) for output in llm.llm_engine.step()]


@pytest.mark.parametrize("after", [1, 2, 9, 40])
def test_an_abort_in_mid_canvas_leaves_nothing_to_the_next_owner_of_its_slot(
    llm: LLM, fresh: Fresh, after: int
):
    inside = Inside(llm)
    start(llm, "leaves", seed=7, prompt=make_prompt(130, variant=1))
    steps(llm, after)
    slot = inside.slot_of("leaves")
    assert inside.used_blocks()
    llm.llm_engine.abort_request(["leaves"])
    start(llm, "comes", seed=2)
    steps(llm, 1)
    assert inside.slot_of("comes") == slot, "the test wants the same slot"
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += steps(llm, 1)
    assert {output.request_id for output in outputs} == {"comes"}
    assert tokens_of(outputs[-1].outputs[0]) == fresh.tokens[2]


def test_an_abort_does_not_disturb_the_requests_beside_it(llm: LLM, fresh: Fresh):
    for name, seed in (("stays", 1), ("leaves", 7), ("stays too", 2)):
        start(llm, name, seed)
    steps(llm, 12)
    llm.llm_engine.abort_request(["leaves"])
    last: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        last |= {output.request_id: tokens_of(output.outputs[0]) for output in steps(llm, 1)}
    assert last == {"stays": fresh.tokens[1], "stays too": fresh.tokens[2]}


def test_an_abort_of_a_waiting_request_is_not_noticed(llm: LLM, fresh: Fresh):
    for number in range(SLOTS):
        start(llm, f"runs {number}", 1)
    start(llm, "waits", 2)
    steps(llm, 3)
    assert "waits" not in Inside(llm).running()
    llm.llm_engine.abort_request(["waits"])
    last: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        last |= {output.request_id: tokens_of(output.outputs[0]) for output in steps(llm, 1)}
    assert last == {f"runs {number}": fresh.tokens[1] for number in range(SLOTS)}


def test_a_request_that_computes_no_numbers_leaves_none_to_the_others(
    llm: LLM, fresh: Fresh, monkeypatch: pytest.MonkeyPatch
):
    # Pages of the cache go from request to request, and attention reads all of a page.
    monkeypatch.setitem(CONSTANTS, "t_max", replace(CONSTANTS["t_max"], least=0.0))
    broken = run(llm, extra_args={"diffusion_t_max": 1e-300, "diffusion_t_min": 0.0})
    assert len(broken.token_ids) == 96
    for _ in range(2):
        assert tokens_of(run(llm)) == fresh.tokens[1]


def test_200_short_requests_over_8_slots(llm: LLM):
    def sampling(number: int) -> SamplingParams:
        return SamplingParams(
            max_tokens=1 + number % 41,
            ignore_eos=True,
            seed=number,
            extra_args={"diffusion_max_steps": 1 + number % 5},
        )

    prompts = [{"prompt_token_ids": make_prompt(1 + number % 37, number)} for number in range(200)]
    answers = llm.generate(prompts, [sampling(n) for n in range(200)], use_tqdm=False)
    for number, answer in enumerate(answers):
        assert len(answer.outputs[0].token_ids) == 1 + number % 41
        assert answer.outputs[0].finish_reason == "length"
    for number in (0, 83, 121, 199):
        (alone,) = llm.generate(prompts[number], sampling(number), use_tqdm=False)
        assert tokens_of(alone.outputs[0]) == tokens_of(answers[number].outputs[0])
    assert len({tuple(answer.outputs[0].token_ids) for answer in answers[41:82]}) > 30


# ---- what arrives ----


def test_deltas_add_up_to_the_whole_answer(llm: LLM, fresh: Fresh):
    sampling = SamplingParams(
        max_tokens=90, ignore_eos=True, seed=1, output_kind=RequestOutputKind.DELTA
    )
    llm.llm_engine.add_request("streams", PROMPT, sampling)
    pieces = []
    while llm.llm_engine.has_unfinished_requests():
        pieces += [output.outputs[0] for output in steps(llm, 1)]
    assert [len(piece.token_ids) for piece in pieces] == [32, 32, 26]
    assert [token for piece in pieces for token in piece.token_ids] == fresh.tokens[1][:90]
    assert "".join(piece.text for piece in pieces) == run(llm, max_tokens=90).text


def test_chat_answers_and_counts(llm: LLM):
    messages = [{"role": "user", "content": "hello"}]
    sampling = SamplingParams(max_tokens=40, ignore_eos=True, seed=5)
    answer, again = (llm.chat(messages, sampling, use_tqdm=False)[0] for _ in range(2))
    assert len(answer.outputs[0].token_ids) == 40
    assert answer.outputs[0].text == again.outputs[0].text
    rendered = llm.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True)
    rendered = rendered if isinstance(rendered, list) else rendered["input_ids"]
    assert answer.prompt_token_ids == rendered


@pytest.mark.parametrize("fused", [True, False])
def test_metrics_count_denoising_steps_positions_and_tokens(llm: LLM, *, fused: bool):
    def counters() -> dict[str, float]:
        return {
            metric.name: metric.value
            for metric in llm.get_metrics()
            if metric.name.startswith("vllm:diffusion_") and hasattr(metric, "value")
        }

    before = counters()
    wish = {"diffusion_max_steps": 3, "diffusion_fused_commit": fused}
    run(llm, extra_args=wish, max_tokens=64)
    moved = {name: value - before.get(name, 0) for name, value in counters().items()}
    # vLLM counts a commit of its own as a step.
    steps = 6 if fused else 8
    assert moved["vllm:diffusion_num_denoising_steps"] == steps
    assert moved["vllm:diffusion_num_canvas_positions"] == steps * CANVAS
    assert moved["vllm:diffusion_num_committed_tokens"] == 64


def test_weights_that_are_loaded_again_are_the_same(
    llm: LLM, fresh: Fresh, parity_checkpoint: Path
):
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(parity_checkpoint)})
    llm.reset_prefix_cache()
    assert tokens_of(run(llm)) == fresh.tokens[1]
