"""Templates, suffixes and drafts: the text is there, slack is not, whoever shares the batch."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.inside import Inside
from helpers.parity import ENGINE, make_prompt
from helpers.probe import Probe
from helpers.rules import Deciding
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_diffusion.denoise.draft import noised_draft

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vllm import LLM, CompletionOutput

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision


pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS, PAD, EOS = 32, 0, 1
# Few enough KV blocks that eight requests of two canvases push each other out.
TIGHT: dict[str, Any] = ENGINE | {"max_model_len": 224, "num_gpu_blocks_override": 40}
TEXTS = ["Name: ", "the sea", ', "age": ', "Grüße 🙂", "\n\tx = ", "1 2"]


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(parity_checkpoint, **TIGHT)


def asking(seed: int, *, max_tokens: int = CANVAS, **wishes: Any) -> SamplingParams:
    """A request; what is no sampling parameter is an option of ours."""
    sampling = {name: wishes.pop(name) for name in list(wishes) if name in SAMPLING}
    extra = {f"diffusion_{name}": value for name, value in wishes.items()}
    return SamplingParams(max_tokens=max_tokens, seed=seed, extra_args=extra or None, **sampling)


SAMPLING = set(SamplingParams.__struct_fields__)


def run(llm: LLM, asked: Sequence[SamplingParams], length: int = 9) -> list[CompletionOutput]:
    """Answers to prompts of growing length, all in one crowd."""
    prompts = [{"prompt_token_ids": make_prompt(length + at, at)} for at in range(len(asked))]
    return [each.outputs[0] for each in llm.generate(prompts, list(asked), use_tqdm=False)]


def run_alone(llm: LLM, asked: Sequence[SamplingParams], length: int = 9) -> list[CompletionOutput]:
    answers = []
    for at, each in enumerate(asked):
        prompt = {"prompt_token_ids": make_prompt(length + at, at)}
        answers.append(llm.generate(prompt, each, use_tqdm=False)[0].outputs[0])
    return answers


def ids(llm: LLM, text: str) -> list[int]:
    return list(llm.get_tokenizer().encode(text, add_special_tokens=False))


def random_template(llm: LLM, rng: random.Random) -> list[str | int]:
    """Text and holes that fit a canvas; text and holes may follow their like."""
    while True:
        template: list[str | int] = [
            rng.choice(TEXTS) if rng.random() < 0.5 else rng.randint(1, 7)
            for _ in range(rng.randint(1, 7))
        ]
        if needed(llm, template) <= CANVAS:
            return template


def needed(llm: LLM, template: Sequence[str | int]) -> int:
    return 1 + sum(each if isinstance(each, int) else len(ids(llm, each)) for each in template)


def assert_filled(llm: LLM, template: Sequence[str | int], answer: CompletionOutput) -> None:
    """The text word for word, nothing but holes between it, the end behind it, no slack."""
    tokens = list(answer.token_ids)
    assert answer.finish_reason == "stop"
    assert tokens[-1] == EOS
    assert len(tokens) <= needed(llm, template)
    # Which tokens are a hole's is not told: all ways to read the answer so far.
    ways = {0}
    for part in template:
        if isinstance(part, int):
            ways = {at + n for at in ways for n in range(part + 1) if clean(tokens[at : at + n])}
        else:
            fixed = ids(llm, part)
            ways = {at + len(fixed) for at in ways if tokens[at : at + len(fixed)] == fixed}
    assert len(tokens) - 1 in ways
    rest = llm.get_tokenizer().decode(tokens, skip_special_tokens=True)
    for part in template:
        if isinstance(part, str):
            _, found, rest = rest.partition(part)
            assert found == part


def clean(hole: list[int]) -> bool:
    return not {PAD, EOS} & set(hole)


def crowd(llm: LLM, number: int) -> tuple[list[list[str | int] | None], list[SamplingParams]]:
    """Templates among requests without, the same in every run; pads are made likely."""
    rng = random.Random(number)
    templates = [random_template(llm, rng) if at % 4 else None for at in range(16)]
    asked = []
    for at, template in enumerate(templates):
        wishes: dict[str, Any] = {"ignore_eos": True, "max_tokens": 2 * CANVAS}
        if template is not None:
            wishes = {"template": template, "logit_bias": {PAD: rng.choice([0.0, 9.0, 14.0])}}
        if at % 3 == 0:
            wishes |= {"temperature": 0.6, "top_p": 0.9, "bad_words": ["a", "the"]}
        asked.append(asking(at, **wishes))
    return templates, asked


@pytest.mark.parametrize("number", [1, 2])
def test_random_templates_in_a_crowd_are_filled_and_change_nobody(llm: LLM, number: int) -> None:
    templates, asked = crowd(llm, number)
    with Probe() as probe:
        together = run(llm, asked)
    assert probe.preemptions, "nobody was preempted"
    shorter = 0
    for template, answer in zip(templates, together, strict=True):
        if template is not None:
            assert_filled(llm, template, answer)
            shorter += len(answer.token_ids) < needed(llm, template)
    assert shorter, "no hole had slack"
    alone = run_alone(llm, asked)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    Inside(llm).assert_idle()


def test_an_aborted_template_leaves_nothing_behind(llm: LLM) -> None:
    plain = asking(3, ignore_eos=True, max_tokens=2 * CANVAS)
    before = run(llm, [plain])[0].token_ids
    engine = llm.llm_engine
    names = [f"aborted-{number}" for number in range(4)]
    for name in names:
        wishes = asking(1, template=["the sea", 9, "1 2", 3], logit_bias={PAD: 9.0})
        engine.add_request(name, {"prompt_token_ids": make_prompt(9)}, wishes)
    for _ in range(3):
        engine.step()
    engine.abort_request(names)
    assert run(llm, [plain])[0].token_ids == before


def test_the_same_parameters_serve_many_prompts_and_stay_as_they_are(llm: LLM) -> None:
    template = ["Name: ", 5, "\nCity: ", 5]
    asked = asking(5, template=template)
    asked.skip_clone = True  # what vLLM's server sets: a request gets a shallow copy
    answers = run(llm, [asked] * 3)
    assert asked.extra_args == {"diffusion_template": template}
    for answer in answers:
        assert_filled(llm, template, answer)
    assert len({tuple(answer.token_ids) for answer in answers}) == 3


def test_several_answers_fill_the_holes_differently(llm: LLM) -> None:
    template = ["Name: ", 9]
    prompt = {"prompt_token_ids": make_prompt(9)}
    asked = asking(5, template=template, n=3, stop_token_ids=[7])
    answers = llm.generate(prompt, asked, use_tqdm=False)[0].outputs
    assert len({tuple(answer.token_ids) for answer in answers}) == 3
    for answer in answers:
        assert_filled(llm, template, answer)


def test_logprobs_are_those_of_the_rows_that_were_kept(llm: LLM) -> None:
    template = ["the sea", 8, "1 2", 8]
    asked = asking(5, template=template, logprobs=2, logit_bias={PAD: 9.0})
    with Probe() as probe:
        (answer,) = run(llm, [asked])
    assert len(answer.token_ids) < needed(llm, template), "no slack"
    last = probe.run(5).canvases[0][-1]
    fixed = {at for at, token in enumerate(rows_of(llm, template)) if token >= 0}
    kept = [at for at in range(needed(llm, template)) if at in fixed or last.argmax[at] != PAD]
    assert last.argmax[kept].tolist() == list(answer.token_ids)
    truth = last.logits[kept].double().log_softmax(-1)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(kept)
    for at, token in enumerate(answer.token_ids):
        position = answer.logprobs[at]
        assert position[token].logprob == pytest.approx(float(truth[at, token]), abs=1e-4)
        assert set(truth[at].topk(2).indices.tolist()) <= set(position)


def rows_of(llm: LLM, template: Sequence[str | int]) -> list[int]:
    rows: list[int] = []
    for part in template:
        rows += [-1] * part if isinstance(part, int) else ids(llm, part)
    return [*rows, EOS]


def test_a_stop_string_may_cut_a_template(llm: LLM) -> None:
    asked = asking(5, template=["the sea", 4, "1 2", 4], stop=["1 2"])
    (answer,) = run(llm, [asked])
    assert answer.text.startswith("the sea")
    assert "1 2" not in answer.text


def test_a_suffix_is_context_and_not_answer(llm: LLM) -> None:
    holes = {}
    for suffix in (" of the sea", "\n\tx = 1", " of the sea" * 20):
        asked = asking(5, max_tokens=12, suffix=suffix, stop_token_ids=[7])
        with Probe() as probe:
            (answer,) = run(llm, [asked])
        seen = probe.run(5).canvases[0][0].canvas.tolist()
        assert seen[12:][: len(ids(llm, suffix))] == ids(llm, suffix)[: CANVAS - 12]
        assert answer.finish_reason == "length"
        assert clean(list(answer.token_ids))
        assert len(answer.token_ids) == 12
        holes[suffix] = tuple(answer.token_ids)
    assert len(set(holes.values())) == 3, "nothing was made of what follows"


def test_a_hole_before_a_suffix_that_is_not_full_ends_with_a_stop(llm: LLM) -> None:
    ends = []
    for bias in (3.0, 6.0, 9.0, 100.0):
        asked = asking(5, max_tokens=12, suffix="the sea", logit_bias={PAD: bias}, logprobs=1)
        (answer,) = run(llm, [asked])
        full = len(answer.token_ids) == 12 and answer.token_ids[-1] != EOS
        assert answer.finish_reason == ("length" if full else "stop")
        assert full or answer.token_ids[-1] == EOS
        assert clean(list(answer.token_ids[: 12 if full else -1]))
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        ends.append(len(answer.token_ids))
    assert ends[-1] == 1, "all slack is an empty answer"
    assert len(set(ends)) > 1


DRAFT = "the sea is a hill of rain and the moon is a boat of sand, " * 2


def padded(llm: LLM, text: str) -> list[int]:
    tokens = [*ids(llm, text), EOS]
    return tokens + [PAD] * (-len(tokens) % CANVAS)


def test_a_draft_is_the_first_input_of_every_canvas_it_reaches(llm: LLM) -> None:
    tokens = padded(llm, DRAFT)
    assert len(tokens) >= 2 * CANVAS
    asked = asking(
        5, max_tokens=3 * CANVAS, ignore_eos=True, draft=DRAFT, noise_level=0.25, max_steps=8
    )
    with Probe() as probe:
        run(llm, [asked])
    noised = noised_draft(tokens, seed=5, start=9, level=0.25)
    for number, canvas in enumerate(probe.run(5).canvases):
        part = noised[number * CANVAS : (number + 1) * CANVAS]
        drafted = bool(part)
        assert canvas[0].step == (6 if drafted else 0)
        assert len(canvas) <= (2 if drafted else 8)
        seen = canvas[0].canvas.tolist()
        assert all(ours in {-1, theirs} for ours, theirs in zip(part, seen, strict=False))


def test_a_draft_of_noise_alone_is_no_draft(llm: LLM) -> None:
    plain = asking(5, max_tokens=3 * CANVAS, ignore_eos=True)
    noise = asking(5, max_tokens=3 * CANVAS, ignore_eos=True, draft=DRAFT, noise_level=1)
    some = asking(5, max_tokens=3 * CANVAS, ignore_eos=True, draft=DRAFT)
    answers = [run(llm, [asked])[0].token_ids for asked in (plain, noise, some)]
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


def test_drafts_come_out_the_same_alone_and_in_a_crowd_that_preempts(llm: LLM) -> None:
    asked = [
        asking(
            at,
            max_tokens=3 * CANVAS,
            ignore_eos=True,
            bad_words=["sea"] if at % 4 == 1 else [],
            **({"draft": DRAFT[at:], "noise_level": 0.1 * (1 + at % 9)} if at % 3 else {}),
        )
        for at in range(12)
    ]
    with Probe() as probe:
        together = run(llm, asked)
    assert probe.preemptions
    alone = run_alone(llm, asked)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


def test_noise_in_a_seed_canvas_leaves_its_pins(llm: LLM) -> None:
    given = [(37 * at) % 400 + 20 for at in range(CANVAS)]
    asked = asking(
        5, ignore_eos=True, seed_canvas=given, pinned=[3, 30], noise_level=0.9, max_steps=10
    )
    with Probe() as probe:
        (answer,) = run(llm, [asked])
    assert [answer.token_ids[at] for at in (3, 30)] == [given[3], given[30]]
    assert probe.run(5).canvases[0][0].step == 1


def refusal(llm: LLM, length: int = 9, **wishes: Any) -> str:
    prompt = {"prompt_token_ids": make_prompt(length)}
    with pytest.raises(VLLMValidationError) as caught:
        llm.generate(prompt, asking(1, **wishes), use_tqdm=False)
    return str(caught.value)


def test_what_does_not_fit_is_refused_with_the_numbers(llm: LLM) -> None:
    assert "needs 41 tokens (0 of text, 40 of holes, 1 for" in refusal(llm, template=[40])
    assert "max_model_len leaves 4 behind" in refusal(llm, length=220, template=[9])
    assert "max_tokens is 5" in refusal(llm, template=[9], max_tokens=5)
    assert "max_tokens is 32, the canvas has 32" in refusal(llm, suffix="a")
    assert "the canvas has 8" in refusal(llm, template=[9], canvas_length=8)
    both = refusal(llm, template=[9], suffix="a", t_min=9, min_tokens=1)
    for part in ("each say how the canvas begins", "min_tokens=1", "diffusion_t_max (0.8)"):
        assert part in both
    Inside(llm).assert_idle()


def test_a_rule_may_commit_a_part_of_a_canvas(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What later rules need: the next canvas begins behind what was committed, not at its end."""

    def front(decision: Decision, _: CanvasPool, batch: CanvasBatch, __: CanvasStats) -> Decision:
        # How much goes by position alone, so that company and preemption cannot change it.
        count = torch.minimum(1 + batch.position[:, 0] % 13, batch.width)
        return replace(decision, commit=replace(decision.commit, count=count))

    wishes = {"max_tokens": 50, "ignore_eos": True, "logprobs": 0, "max_steps": 6}
    asked = [asking(at, **wishes) for at in range(10)]
    sampler = Inside(llm).runner.sampler
    monkeypatch.setattr(sampler, "rule", Deciding(front, sampler.pool.vocab_size))
    with Probe() as probe:
        together = run(llm, asked, length=40)
    assert probe.preemptions
    alone = run_alone(llm, asked, length=40)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    assert {len(each.token_ids) for each in together} == {50}
    assert {len(each.logprobs or ()) for each in together} == {50}
    Inside(llm).assert_idle()
