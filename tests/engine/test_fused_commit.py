"""A commit beside the next canvas's first step gives what a forward of its own gives.

The same requests, fused and separate, in one engine: logits of every step, the cache every canvas
finds, tokens and what is told of them. And the fused form through everything that may happen to a
request between the step that gives a canvas and the forward that commits it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
from helpers.cases import for_each
from helpers.engines import engine_config
from helpers.fused import PartOf, assert_same_run, texts
from helpers.inside import Inside
from helpers.parity import ENGINE, SPEC, make_prompt
from helpers.probe import Probe
from vllm import SamplingParams

from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.fusion import Fusion

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vllm import LLM, CompletionOutput

pytestmark = pytest.mark.vllm

CANVAS, WINDOW = SPEC.canvas, SPEC.sliding_window
WIDTHS = (1, 17, CANVAS - 1, CANVAS)
PREFIXES = (1, 23, WINDOW - 1, WINDOW, WINDOW + 1, 87, 121)
FORMS = (True, False)


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(parity_checkpoint, **ENGINE)


def sampling(fused: bool | None, seed: int, **options: Any) -> SamplingParams:
    """Three canvases of few steps, unless told otherwise; telemetry."""
    wished = {"max_steps": 3, "telemetry": True} | options.pop("diffusion", {})
    if fused is not None:
        wished["fused_commit"] = fused
    extra = {f"diffusion_{name}": value for name, value in wished.items()}
    defaults = {"max_tokens": 3 * CANVAS, "ignore_eos": True}
    return SamplingParams(seed=seed, extra_args=extra, **(defaults | options))


def ask(llm: LLM, prompts: list[list[int]], wishes: list[SamplingParams]) -> list[CompletionOutput]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], wishes, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def told(answer: CompletionOutput) -> tuple[int, int]:
    """Its forwards that denoised, and those that only committed."""
    telemetry = answer.diffusion  # type: ignore[attr-defined]
    return telemetry.denoise_forwards, telemetry.commit_forwards


# ---- the forward ----


@pytest.mark.parametrize("prefix", PREFIXES)
def test_logits_and_cache_are_those_of_two_forwards(llm: LLM, prefix: int) -> None:
    prompts = [make_prompt(prefix, number) for number in range(len(WIDTHS))]

    def wishes(fused: bool) -> list[SamplingParams]:
        return [
            sampling(fused, 50 + number, max_tokens=3 * width, diffusion={"canvas_length": width})
            for number, width in enumerate(WIDTHS)
        ]

    with Probe() as fused:
        together = ask(llm, prompts, wishes(fused=True))
    alone, probes = [], []
    for prompt, wish in zip(prompts, wishes(fused=False), strict=True):
        with Probe() as separate:
            alone += ask(llm, [prompt], [wish])
        probes.append(separate)
    for number, probe in enumerate(probes):
        assert_same_run(fused, probe, 50 + number)
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]
    for answer, other in zip(together, alone, strict=True):
        denoised, committed = told(answer)
        assert (denoised, committed) == (told(other)[0], 0)
        assert told(other)[1] == 3


@pytest.fixture
def partial(llm: LLM) -> Iterator[LLM]:
    sampler = Inside(llm).runner.sampler
    published = sampler.rule
    sampler.rule = PartOf(published.noise)
    yield llm
    sampler.rule = published


def test_a_canvas_of_which_a_part_is_committed(partial: LLM) -> None:
    prompts = [make_prompt(length, length) for length in (3, 41, 58, 90)]
    answers = {}
    with Probe() as fused:
        answers[True] = ask(partial, prompts, [sampling(True, 70 + n) for n in range(4)])
    with Probe() as separate:
        answers[False] = ask(partial, prompts, [sampling(False, 70 + n) for n in range(4)])
    for number in range(4):
        assert_same_run(fused, separate, 70 + number)
        counts = [each.tokens for each in answers[True][number].diffusion.canvases]  # type: ignore[attr-defined]
        assert len(set(counts)) > 2, counts
    assert [a.token_ids for a in answers[True]] == [a.token_ids for a in answers[False]]


def test_a_forward_a_canvas_is_saved(llm: LLM) -> None:
    forwards = {}
    for fused in FORMS:
        with Probe() as probe:
            (answer,) = ask(llm, [make_prompt(30)], [sampling(fused, 1)])
        steps = [len(canvas) for canvas in probe.run(1).canvases]
        forwards[fused] = len(probe.forwards) - 1  # the prompt's
        assert told(answer) == (sum(steps), 0 if fused else 3)
    assert forwards[False] - forwards[True] == 3


# ---- what an answer is ----


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 3, "prompt_logprobs": 2},
        {"logprobs": 20, "temperature": 0.0},
        {"bad_words": ["a", "no"], "repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.2, "min_p": 0.01},
        {"diffusion": {"seed_canvas": [20] * CANVAS, "pinned": [0, 3, CANVAS - 1]}},
        {"diffusion": {"draft": "the sea is a hill of rain " * 6, "noise_level": 0.5}},
        {"diffusion": {"read_only": True, "canvas_length": 20}},
        {"max_tokens": CANVAS + 1},
        {"max_tokens": 2 * CANVAS - 1, "n": 2},
    ],
    ids=str,
)
def test_the_answer_is_the_same(llm: LLM, options: dict[str, Any]) -> None:
    if "bad_words" in options:
        assert llm.get_tokenizer().encode("a", add_special_tokens=False)
    made = {}
    for fused in FORMS:
        wish = sampling(
            fused, 9, **{k: dict(v) if k == "diffusion" else v for k, v in options.items()}
        )
        outputs = llm.generate(
            [{"prompt_token_ids": make_prompt(40)}] * 2, [wish] * 2, use_tqdm=False
        )
        made[fused] = [
            (
                list(answer.token_ids),
                answer.text,
                answer.finish_reason,
                [
                    {token: round(one.logprob, 4) for token, one in place.items()}
                    for place in answer.logprobs or ()
                ],
                [place and len(place) for place in output.prompt_logprobs or ()],
                [(each.steps, each.tokens) for each in answer.diffusion.canvases],  # type: ignore[attr-defined]
            )
            for output in outputs
            for answer in output.outputs
        ]
    assert made[True] == made[False]


@pytest.mark.parametrize("place", [0, 1, CANVAS - 1, CANVAS, CANVAS + 9, 2 * CANVAS - 1])
def test_a_stop_token_ends_it_without_a_commit(llm: LLM, place: int) -> None:
    prompt = make_prompt(33)
    (whole,) = ask(llm, [prompt], [sampling(True, 4)])
    stop = whole.token_ids[place]
    first = list(whole.token_ids).index(stop)
    for fused in FORMS:
        (answer,) = ask(llm, [prompt], [sampling(fused, 4, stop_token_ids=[stop])])
        assert list(answer.token_ids) == list(whole.token_ids[: first + 1])
        assert answer.finish_reason == "stop"
        assert told(answer)[1] == (0 if fused else 1 + first // CANVAS)
    Inside(llm).assert_idle()


@for_each(left=[1, 2, 31, 32, 33, 50, 63, 64, 65])
def test_the_end_of_max_model_len(llm: LLM, left: int) -> None:
    prompt = make_prompt(llm.llm_engine.model_config.max_model_len - left)
    answers = [ask(llm, [prompt], [sampling(fused, 6, max_tokens=999)])[0] for fused in FORMS]
    assert [len(each.token_ids) for each in answers] == [left, left]
    assert answers[0].token_ids == answers[1].token_ids
    assert told(answers[0])[1] == 0


# ---- what may happen to it ----

MOMENTS = range(1, 10)
"""Steps of an engine in which a request of three canvases runs, behind its prompt's."""


def pair() -> list[tuple[list[int], SamplingParams]]:
    return [(make_prompt(40), sampling(True, 1)), (make_prompt(61, 1), sampling(None, 2))]


def nothing(step: int) -> None:
    del step


@pytest.mark.parametrize("cached", [True, False], ids=["cache kept", "cache lost"])
def test_preemption_at_any_moment_gives_every_token_once(
    llm: LLM, subtests: pytest.Subtests, *, cached: bool
) -> None:
    expected = texts(llm, pair(), nothing)
    assert [len(each) for each in expected] == [3 * CANVAS] * 2
    scheduler = Inside(llm).scheduler
    lost: list[str] = []

    def preempt() -> None:
        lost.extend(request.request_id for request in scheduler.running)
        if cached:
            for request in [*scheduler.running]:
                scheduler.running.remove(request)
                scheduler._preempt_request(request, 0.0)
        else:
            scheduler.reset_prefix_cache(reset_running_requests=True)

    for moment in MOMENTS:
        with subtests.test(moment=moment):
            lost.clear()
            given = texts(llm, pair(), lambda step, at=moment: step == at and preempt())
            assert given == expected
            assert len(lost) == 2, "nothing ran any more"
            Inside(llm).assert_idle()


def test_an_abort_at_any_moment_leaves_nothing(llm: LLM, subtests: pytest.Subtests) -> None:
    expected = texts(llm, pair(), nothing)

    def abort() -> None:
        llm.llm_engine.abort_request(["0"])

    for moment in MOMENTS:
        with subtests.test(moment=moment):
            given, kept = texts(llm, pair(), lambda step, at=moment: step == at and abort())
            assert given == expected[0][: len(given)]
            assert kept == expected[1]
            Inside(llm).assert_idle()


@pytest.mark.parametrize("budget", [CANVAS, 2 * CANVAS - 1, 2 * CANVAS, 3 * CANVAS, 100])
def test_a_budget_too_small_for_both_lets_the_commit_go_ahead(
    llm: LLM, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [make_prompt(length, length) for length in (20, 70, 45)]
    wishes = [sampling(True, 30 + number) for number in range(3)]
    expected = ask(llm, prompts, wishes)
    monkeypatch.setattr(Inside(llm).scheduler, "max_num_scheduled_tokens", budget)
    with Probe() as probe:
        answers = ask(llm, prompts, wishes)
    assert [each.token_ids for each in answers] == [each.token_ids for each in expected]
    alone = [told(each)[1] for each in answers]
    if budget < 2 * CANVAS:
        assert alone == [2, 2, 2]  # the last canvas of each needs none
    assert (
        len({len(step.canvas) for n in range(3) for c in probe.run(30 + n).canvases for step in c})
        == 1
    )
    for number, answer in enumerate(answers):
        assert told(answer)[0] == sum(len(canvas) for canvas in probe.run(30 + number).canvases)


def test_a_next_turn_finds_the_canvases_that_were_committed(llm: LLM) -> None:
    prompt = make_prompt(64)
    found = {}
    for fused in FORMS:
        assert llm.reset_prefix_cache()
        (answer,) = ask(llm, [prompt], [sampling(fused, 3, max_tokens=2 * CANVAS)])
        turn = [*prompt, *answer.token_ids, *make_prompt(9, 5)]
        (output,) = llm.generate([{"prompt_token_ids": turn}], sampling(fused, 3), use_tqdm=False)
        found[fused] = output.num_cached_tokens
    # A commit of its own does not help: vLLM enters pages into the cache when the next rows of
    # their request are scheduled.
    assert found == {True: 64 + CANVAS, False: 64 + CANVAS}


# ---- who decides ----


def test_what_keeps_commits_apart(parity_checkpoint: Path) -> None:
    config = engine_config(parity_checkpoint)
    family = carriers.served(config.model_config.hf_config).family
    assert Fusion.of(config, family) == Fusion(why_not=None, served=True)

    for part, name, value, found in (
        ("scheduler_config", "async_scheduling", True, Fusion(None, served=True, foreseen=True)),
        ("device_config", "device_type", "cuda", Fusion(None, served=True)),
        ("scheduler_config", "scheduler_cls", "A.B", Fusion("scheduler_cls is A.B", served=True)),
    ):
        changed = copy.copy(config)
        setattr(changed, part, copy.copy(getattr(config, part)))
        setattr(getattr(changed, part), name, value)
        assert Fusion.of(changed, family) == found
        assert found.holds_for(asked=True) is (found.why_not is None)


@pytest.mark.parametrize("served", [True, False])
def test_a_request_decides_before_its_server(*, served: bool) -> None:
    fusion = Fusion(why_not=None, served=served)
    assert fusion.holds_for(None) is served
    for asked in (True, False):
        assert fusion.holds_for(asked) is asked


def test_a_server_that_does_not_fuse(engine: Callable[..., LLM], parity_checkpoint: Path) -> None:
    served = {"diffusion": {"fused_commit": False}}
    llm = engine(parity_checkpoint, **ENGINE, additional_config=served)
    wishes = [sampling(None, 1), sampling(True, 1), sampling(False, 1)]
    answers = ask(llm, [make_prompt(40)] * 3, wishes)
    assert [told(each)[1] for each in answers] == [3, 0, 3]
    assert answers[0].token_ids == answers[1].token_ids
