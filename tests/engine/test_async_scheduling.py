"""Steps scheduled before the results of the last are known, as on a GPU: the same answers.

vLLM switches that off on a CPU, where it gains nothing; the engine here has it all the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.cases import for_each
from helpers.fused import PartOf, assert_same_run, texts
from helpers.inside import Inside
from helpers.parity import ENGINE, SPEC, make_prompt
from helpers.probe import Probe
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from vllm_diffusion.engine.scheduler import AsyncCanvasScheduler, CanvasScheduler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm import LLM, CompletionOutput
    from vllm.v1.request import Request

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS, WINDOW, MAX_MODEL_LEN = SPEC.canvas, SPEC.sliding_window, 256
SEA = "The capital of France is Paris, a city on the river Seine. " * 2
TOO_LARGE = r"(a|b)*a(a|b){14}"
"""For an automaton: a parser keeps it."""
PEOPLE = {
    "type": "array",
    "maxItems": 2,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    },
}


def asked(
    *, max_tokens: int | None = 70, extra: dict[str, Any] | None = None, **sampling: Any
) -> SamplingParams:
    if constraint := sampling.pop("constraint", None):
        sampling["structured_outputs"] = StructuredOutputsParams(**constraint)
    options = {"diffusion_max_steps": 5, "diffusion_telemetry": True} | (extra or {})
    return SamplingParams(**{"seed": 1} | sampling, max_tokens=max_tokens, extra_args=options)


def requests() -> dict[str, SamplingParams]:
    pinned = {"diffusion_seed_canvas": [*range(40, 72)], "diffusion_pinned": [3, 9, 30]}
    return {
        "plain": asked(ignore_eos=True),
        "to the end": asked(ignore_eos=True, max_tokens=None),
        "narrow": asked(ignore_eos=True, extra={"diffusion_canvas_length": 8}),
        "preset": asked(extra={"diffusion_preset": "balanced"}),
        "greedy": asked(seed=None, temperature=0),
        "read only": asked(extra={"diffusion_read_only": True, "diffusion_canvas_length": 20}),
        "cut": asked(top_k=20, top_p=0.9, min_p=0.01, ignore_eos=True),
        "penalised": asked(repetition_penalty=1.3, bad_words=["the sea"], min_tokens=40),
        "logprobs": asked(logprobs=2, prompt_logprobs=1, ignore_eos=True),
        "stopped": asked(stop=["a", "e"]),
        "pinned": asked(extra=pinned, ignore_eos=True),
        "template": asked(extra={"diffusion_template": ["ab", 4, "cd", 6, "."]}),
        "drafted": asked(extra={"diffusion_draft": "the sea is blue"}),
        "choice": asked(constraint={"choice": [SEA]}, max_tokens=100),
        "schema": asked(constraint={"json": PEOPLE}, logprobs=2),
        "patient": asked(constraint={"regex": "[a-d]*"}, min_tokens=CANVAS + 4),
        "parsed": asked(constraint={"regex": TOO_LARGE}),
        "parsed, several": asked(constraint={"regex": TOO_LARGE}, n=2, seed=6),
    }


def said(answer: CompletionOutput) -> tuple[Any, ...]:
    """All that an answer says but how its canvases were committed."""
    scores = [
        # Other requests are in a batch, so products may round otherwise.
        {token: pytest.approx(each.logprob, abs=1e-3) for token, each in place.items()}
        for place in answer.logprobs or ()
    ]
    canvases = answer.diffusion.canvases  # type: ignore[attr-defined]
    told = [(each.steps, each.stopped_by, each.tokens) for each in canvases]
    return list(answer.token_ids), answer.text, answer.finish_reason, scores, told


def answers(llm: LLM) -> dict[str, list[Any]]:
    wishes = requests()
    prompts = [f"hello {number}" for number in range(len(wishes))]
    outputs = llm.generate(prompts, list(wishes.values()), use_tqdm=False)
    return {
        name: [said(answer) for answer in output.outputs]
        for name, output in zip(wishes, outputs, strict=True)
    }


def test_every_kind_of_request_is_answered_alike(
    engine: Callable[..., LLM], parity_checkpoint: Any, cry: Callable[[bool], None]
) -> None:
    options = {"checkpoint": parity_checkpoint, "max_model_len": MAX_MODEL_LEN}
    llm = engine(**options)
    assert isinstance(Inside(llm).scheduler, CanvasScheduler)
    one_by_one = answers(llm)
    assert len({str(each) for each in one_by_one.values()}) == len(one_by_one)
    llm = engine(async_scheduling=True, **options)
    assert isinstance(Inside(llm).scheduler, AsyncCanvasScheduler)
    for name, answer in answers(llm).items():
        assert answer == one_by_one[name], name
    cry(True)
    for name, answer in answers(llm).items():
        assert answer == one_by_one[name], name
    for moment in (3, 8):
        assert preempted_at(llm, moment) == one_by_one["parsed"][0][0]


# ---- commits ----

WOLVES = pytest.mark.parametrize("wolf", [False, True], ids=["foreseen", "wrongly foreseen"])
MOMENTS = range(1, 12)


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(parity_checkpoint, async_scheduling=True, **ENGINE)


@pytest.fixture
def cry(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let the scheduler take every step in flight for the last of its canvas."""

    def of(wolf: bool) -> None:
        inner = AsyncCanvasScheduler._in_last_step

        def ends(scheduler: AsyncCanvasScheduler, request: Request) -> bool:
            if wolf:
                scheduler._taken[request.request_id] = 1 << 30
            return inner(scheduler, request)

        monkeypatch.setattr(AsyncCanvasScheduler, "_in_last_step", ends)

    return of


def wished(seed: int, *, fused: bool = True, steps: int = 3, **sampling: Any) -> SamplingParams:
    """Three canvases of so many steps, unless told otherwise."""
    extra = {"diffusion_max_steps": steps, "diffusion_fused_commit": fused}
    extra |= sampling.pop("extra", {})
    defaults: dict[str, Any] = {"max_tokens": 3 * CANVAS, "ignore_eos": True}
    return asked(seed=seed, extra=extra, **(defaults | sampling))


def ask(llm: LLM, prompts: list[list[int]], wishes: list[SamplingParams]) -> list[CompletionOutput]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], wishes, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def told(answer: CompletionOutput) -> tuple[int, int, int]:
    """Its forwards that denoised, those that only committed, the rows of all."""
    telemetry = answer.diffusion  # type: ignore[attr-defined]
    return telemetry.denoise_forwards, telemetry.commit_forwards, telemetry.rows


def test_a_canvas_that_takes_all_its_steps_is_committed_beside_the_next(llm: LLM) -> None:
    for steps in (2, 3, 7):
        (answer,) = ask(llm, [make_prompt(30)], [wished(1, steps=steps)])
        assert told(answer) == (3 * steps, 0, (3 * steps + 2) * CANVAS)
        (separate,) = ask(llm, [make_prompt(30)], [wished(1, steps=steps, fused=False)])
        assert told(separate) == (3 * steps, 3, (3 * steps + 3) * CANVAS)
        assert answer.token_ids == separate.token_ids
    Inside(llm).assert_idle()


def test_one_that_ends_sooner_gives_its_tokens_at_once_and_is_committed_behind(llm: LLM) -> None:
    # Below this threshold every canvas is sure of itself in its first step.
    sure = {"diffusion_confidence_threshold": 99.0, "diffusion_stability_threshold": 0}
    (answer,) = ask(llm, [make_prompt(30)], [wished(1, steps=9, extra=sure)])
    assert told(answer) == (3, 2, 5 * CANVAS)
    (separate,) = ask(llm, [make_prompt(30)], [wished(1, steps=9, fused=False, extra=sure)])
    assert told(separate) == (3, 3, 6 * CANVAS)
    assert answer.token_ids == separate.token_ids


def test_rows_that_were_granted_for_nothing_change_nothing(
    llm: LLM, cry: Callable[[bool], None]
) -> None:
    (expected,) = ask(llm, [make_prompt(30)], [wished(1, steps=5)])
    cry(True)
    (answer,) = ask(llm, [make_prompt(30)], [wished(1, steps=5)])
    denoise, commit, rows = told(answer)
    assert (denoise, commit) == (15, 0)
    assert rows - (15 + 2) * CANVAS > 5 * CANVAS, "nothing was granted for nothing"
    assert answer.token_ids == expected.token_ids


@WOLVES
@pytest.mark.parametrize("prefix", [1, WINDOW - 1, WINDOW, WINDOW + 1, 87])
def test_logits_and_cache_are_those_of_two_forwards(
    llm: LLM, cry: Callable[[bool], None], prefix: int, *, wolf: bool
) -> None:
    widths = (1, 17, CANVAS - 1, CANVAS)
    prompts = [make_prompt(prefix, number) for number in range(len(widths))]

    def wishes(*, fused: bool) -> list[SamplingParams]:
        return [
            wished(
                50 + number,
                fused=fused,
                max_tokens=3 * width,
                extra={"diffusion_canvas_length": width},
            )
            for number, width in enumerate(widths)
        ]

    with Probe() as separate:
        expected = ask(llm, prompts, wishes(fused=False))
    cry(wolf)
    with Probe() as fused:
        answers = ask(llm, prompts, wishes(fused=True))
    assert [each.token_ids for each in answers] == [each.token_ids for each in expected]
    for number in range(len(widths)):
        assert_same_run(fused, separate, 50 + number)


@WOLVES
def test_a_canvas_of_which_a_part_is_committed(
    llm: LLM, cry: Callable[[bool], None], *, wolf: bool
) -> None:
    cry(wolf)
    sampler = Inside(llm).runner.sampler
    prompts = [make_prompt(length, length) for length in (3, 41, 58, 90)]
    given = {}
    published = sampler.rule
    sampler.rule = PartOf(published.noise)
    try:
        for fused in (True, False):
            wishes = [wished(number, fused=fused, max_tokens=100) for number in range(4)]
            given[fused] = [answer.token_ids for answer in ask(llm, prompts, wishes)]
    finally:
        sampler.rule = published
    assert given[True] == given[False]
    Inside(llm).assert_idle()


@WOLVES
@for_each(left=[1, 2, 31, 32, 33, 63, 65, 95, 96, 97, 129])
def test_the_end_of_max_model_len(
    llm: LLM, cry: Callable[[bool], None], left: int, *, wolf: bool
) -> None:
    cry(wolf)
    prompt = make_prompt(llm.llm_engine.model_config.max_model_len - left)
    answers = [
        ask(llm, [prompt], [wished(6, fused=fused, max_tokens=999)])[0] for fused in (True, False)
    ]
    assert [len(each.token_ids) for each in answers] == [left, left]
    assert answers[0].token_ids == answers[1].token_ids
    Inside(llm).assert_idle()


@WOLVES
@pytest.mark.parametrize("budget", [CANVAS, 2 * CANVAS - 1, 2 * CANVAS, 3 * CANVAS, 100])
def test_a_small_budget(
    llm: LLM,
    cry: Callable[[bool], None],
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    *,
    wolf: bool,
) -> None:
    prompts = [make_prompt(length, length) for length in (20, 70, 45)]
    wishes = [wished(30 + number) for number in range(3)]
    expected = ask(llm, prompts, wishes)
    cry(wolf)
    monkeypatch.setattr(Inside(llm).scheduler, "max_num_scheduled_tokens", budget)
    answers = ask(llm, prompts, wishes)
    assert [each.token_ids for each in answers] == [each.token_ids for each in expected]


@WOLVES
@pytest.mark.parametrize("what", ["preempt", "forget", "abort"])
def test_what_happens_at_any_moment_loses_and_doubles_no_token(
    llm: LLM, cry: Callable[[bool], None], what: str, subtests: pytest.Subtests, *, wolf: bool
) -> None:
    def pair() -> list[tuple[list[int], SamplingParams]]:
        sure = {"diffusion_confidence_threshold": 99.0, "diffusion_stability_threshold": 1}
        return [
            (make_prompt(40), wished(1)),
            (make_prompt(61, 1), wished(2, extra=sure)),
            (make_prompt(12, 2), wished(3, steps=1)),
        ]

    def disturb() -> None:
        if what == "abort":
            llm.llm_engine.abort_request(["0"])
        elif what == "forget":
            scheduler.reset_prefix_cache(reset_running_requests=True)
        else:
            for request in [*scheduler.running]:
                scheduler.running.remove(request)
                scheduler._preempt_request(request, 0.0)

    expected = texts(llm, pair(), lambda _: None)
    assert [len(each) for each in expected] == [3 * CANVAS] * 3
    cry(wolf)
    scheduler = Inside(llm).scheduler
    for moment in MOMENTS:
        with subtests.test(moment=moment):
            first, *others = texts(llm, pair(), lambda step, at=moment: step == at and disturb())
            assert first == (expected[0][: len(first)] if what == "abort" else expected[0])
            assert others == expected[1:]
            Inside(llm).assert_idle()


def preempted_at(llm: LLM, moment: int) -> list[int]:
    """The tokens of a request that a parser keeps and that loses its place at some step."""
    wish = requests()["parsed"]
    wish.output_kind = RequestOutputKind.DELTA
    index = [*requests()].index("parsed")
    llm.llm_engine.add_request("0", f"hello {index}", wish)
    given: list[int] = []
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        if step == moment:
            Inside(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            given += output.outputs[0].token_ids
        step += 1
        assert step < 200
    return given
