"""A request's text does not depend on its company: batch, order of arrival, preemption, aborts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from helpers.doubt import decided_run
from helpers.parity import ENGINE, SPEC, assert_parity, make_prompt, scheduler_of
from helpers.probe import Probe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from helpers.oracle import Oracle, OracleRun
    from vllm import LLM

pytestmark = pytest.mark.vllm

CANVAS = SPEC.canvas


@dataclass(frozen=True, slots=True)
class Asked:
    """One request and what Transformers makes of it, alone."""

    prompt: list[int]
    seed: int
    reference: OracleRun
    fused: bool | None = None

    @property
    def max_tokens(self) -> int:
        return len(self.reference.tokens)


@pytest.fixture(scope="module")
def questions(oracle: Oracle) -> list[Asked]:
    """Short and long prompts, one to three canvases."""
    requests = []
    for number, (length, canvases) in enumerate(
        [(3, 3), (31, 2), (64, 3), (120, 1), (90, 3), (12, 2)]
    ):
        prompt = make_prompt(length, variant=number)
        seed, reference = decided_run(oracle, prompt, 10 + number, canvases=canvases)
        requests.append(Asked(prompt, seed, reference))
    return requests


@pytest.fixture(params=[True, False], ids=["fused", "separate"])
def asked(request: pytest.FixtureRequest, questions: list[Asked]) -> list[Asked]:
    """The same, with a forward of its own for every commit or without."""
    return [replace(each, fused=request.param) for each in questions]


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(parity_checkpoint, **ENGINE)


def submit(llm: LLM, name: str, request: Asked) -> None:
    from vllm import SamplingParams

    llm.llm_engine.add_request(
        name,
        {"prompt_token_ids": request.prompt},
        SamplingParams(
            seed=request.seed,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            extra_args={"diffusion_fused_commit": request.fused},
        ),
    )


def run(
    llm: LLM, arrivals: Sequence[tuple[int, Asked]], *, aborts: dict[int, int] | None = None
) -> list[list[int]]:
    """Step the engine until all are done.

    Args:
        llm: the engine, idle.
        arrivals: (step, request); the request arrives before that step.
        aborts: step -> index of the request to abort before it; its text stays empty.
    """
    waiting = sorted(range(len(arrivals)), key=lambda index: arrivals[index][0])
    texts: list[list[int]] = [[] for _ in arrivals]
    step = 0
    while waiting or llm.llm_engine.has_unfinished_requests():
        while waiting and arrivals[waiting[0]][0] <= step:
            index = waiting.pop(0)
            submit(llm, str(index), arrivals[index][1])
        if aborts and step in aborts:
            llm.llm_engine.abort_request([str(aborts[step])])
        for output in llm.llm_engine.step():
            if output.finished and output.outputs[0].finish_reason != "abort":
                texts[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
        assert step < 3000, "the engine makes no progress"
    return texts


def assert_all(texts: list[list[int]], probe: Probe, requests: Sequence[Asked]) -> None:
    """Tokens first, the error that says most; then every number of every step."""
    wrong = [i for i, r in enumerate(requests) if texts[i] != r.reference.tokens]
    for index, request in enumerate(requests):
        assert_parity(probe.run(request.seed), request.reference)
        assert texts[index] == request.reference.tokens, f"requests {wrong} differ"


def test_all_at_once(llm: LLM, asked: list[Asked]) -> None:
    with Probe() as probe:
        texts = run(llm, [(0, request) for request in asked])
    assert max(forward.canvases for forward in probe.forwards) == len(asked)
    assert_all(texts, probe, asked)


@pytest.mark.parametrize(
    "order", [(5, 4, 3, 2, 1, 0), (2, 0, 4, 1, 5, 3)], ids=["reversed", "shuffled"]
)
def test_any_order_of_arrival(llm: LLM, asked: list[Asked], order: tuple[int, ...]) -> None:
    requests = [asked[index] for index in order]
    with Probe() as probe:
        texts = run(llm, [(0, request) for request in requests])
    assert_all(texts, probe, requests)


@pytest.mark.parametrize("gap", [1, 5, 23])
def test_arriving_while_others_write(llm: LLM, asked: list[Asked], gap: int) -> None:
    with Probe() as probe:
        texts = run(llm, [(gap * index, request) for index, request in enumerate(asked)])
    assert any(forward.prompts and forward.canvases for forward in probe.forwards)
    assert_all(texts, probe, asked)


def test_prompt_canvas_and_commit_in_one_forward(
    llm: LLM, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step's budget of four canvases: prompts come in pieces and canvases wait for each other.
    monkeypatch.setattr(scheduler_of(llm), "max_num_scheduled_tokens", 4 * CANVAS)
    commits = asked[0].reference.steps[0] + 1
    arrivals = [(0, asked[0])]
    # One long prompt after another keeps a prompt in flight when the first canvas commits.
    arrivals += [(commits - 2 + index, request) for index, request in enumerate(asked[2:5])]
    with Probe() as probe:
        texts = run(llm, arrivals)
    assert any(f.prompts and f.commits for f in probe.forwards), probe.forwards
    assert any(f.prompts and f.canvases for f in probe.forwards), probe.forwards
    assert any(f.canvases and f.commits for f in probe.forwards), probe.forwards
    assert_all(texts, probe, [request for _, request in arrivals])


def test_more_requests_than_slots(
    llm: LLM, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_of(llm), "max_num_active_reqs", 2)
    with Probe() as probe:
        texts = run(llm, [(0, request) for request in asked])
    assert max(forward.requests for forward in probe.forwards) <= 2
    assert_all(texts, probe, asked)


def test_an_abort_in_mid_canvas_leaves_nothing_behind(
    llm: LLM, asked: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two slots, so the late request can only run in the aborted one's.
    monkeypatch.setattr(scheduler_of(llm), "max_num_active_reqs", 2)
    stays, aborted, follows = asked[0], asked[2], asked[4]
    with Probe() as probe:
        texts = run(llm, [(0, stays), (0, aborted), (0, follows)], aborts={6: 1})
    begun = probe.run(aborted.seed).attempts
    assert begun, "the aborted request had not begun its canvas"
    assert not begun[-1][-1].finished, "its canvas was finished before the abort"
    assert texts.pop(1) == []
    assert_all(texts, probe, [stays, follows])


def test_a_batch_that_fuses_some_of_its_commits(llm: LLM, asked: list[Asked]) -> None:
    requests = [replace(each, fused=index % 2 == 0) for index, each in enumerate(asked)]
    with Probe() as probe:
        texts = run(llm, [(0, request) for request in requests])
    assert any(f.canvases + f.commits > f.requests for f in probe.forwards)
    assert_all(texts, probe, requests)


def test_preemption_by_a_tiny_cache(
    engine: Callable[..., LLM], parity_checkpoint: Path, asked: list[Asked]
) -> None:
    # One request of the longest length fits three times or so; six run.
    small = engine(
        parity_checkpoint, **ENGINE | {"max_model_len": 224, "num_gpu_blocks_override": 40}
    )
    with Probe() as probe:
        texts = run(small, [(0, request) for request in asked])
    assert probe.preemptions > 0, "the cache was large enough for all: nothing was preempted"
    interrupted = [
        attempt
        for request in asked
        for attempt in probe.run(request.seed).attempts
        if not attempt[-1].finished
    ]
    assert interrupted, "every preemption fell between two canvases"
    assert_all(texts, probe, asked)
