"""A canvas runs at one width from its first forward to its commit, or not at all.

Our schedulers against a worker that only counts, synchronous and asynchronous, then the same seen
from inside a running engine.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.cases import for_each
from helpers.engines import engine_config
from helpers.scheduling import (
    BLOCK,
    NO_RULE,
    STOP,
    TEXT,
    CountingWorker,
    assert_nothing_is_left,
    drive,
    make_request,
    make_scheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler, DiffusionScheduler
from vllm.v1.request import RequestStatus

from vllm_diffusion.engine.scheduler import (
    AsyncCanvasScheduler,
    CanvasScheduler,
    WholeCanvasMixin,
)
from vllm_diffusion.request.admitted import Admitted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

pytestmark = pytest.mark.vllm

CANVAS = 32

BOTH = pytest.mark.parametrize(
    ("scheduler_class", "depth"),
    [(CanvasScheduler, 1), (AsyncCanvasScheduler, 2), (AsyncCanvasScheduler, 3)],
    ids=["sync", "async", "async-3-deep"],
)


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> VllmConfig:
    return engine_config(tiny_checkpoint)


def widths_of(worker: CountingWorker, request: str) -> list[int]:
    """The width of each of the request's canvases, checked to be one width each, end to end."""
    canvases = [canvas for canvas in worker.canvases if canvas.request == request]
    for canvas, following in itertools.pairwise(canvases):
        assert following.start == canvas.start + canvas.tokens
    for canvas in canvases:
        assert len(set(canvas.widths)) == 1, f"cut in the middle of its life: {canvas}"
    return [canvas.widths[0] for canvas in canvases]


# ---- ends ----


@BOTH
def test_whole_canvases_then_the_rest_is_dropped_at_max_tokens(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    scheduler, worker = make_scheduler(config, scheduler_class), CountingWorker()
    requests = [make_request("a", 20, 70), make_request("b", 1, 5), make_request("c", 40, 64)]
    tokens = drive(scheduler, worker, requests, canvas=CANVAS, depth=depth)
    assert {name: len(given) for name, given in tokens.items()} == {"a": 70, "b": 5, "c": 64}
    assert widths_of(worker, "a") == [32, 32, 32]
    assert widths_of(worker, "b") == [32]
    assert widths_of(worker, "c") == [32, 32]
    assert_nothing_is_left(scheduler)


@BOTH
@for_each(left=[1, 2, 3, 31, 32, 33, 50, 63, 64, 65])
def test_the_last_canvas_before_max_model_len_is_narrower_and_keeps_its_width(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int, left: int
):
    scheduler, worker = make_scheduler(config, scheduler_class, max_model_len=128), CountingWorker()
    tokens = drive(
        scheduler, worker, [make_request("a", 128 - left, 500)], canvas=CANVAS, depth=depth
    )
    assert len(tokens["a"]) == left
    assert widths_of(worker, "a") == [32] * (left // 32) + [left % 32] * bool(left % 32)
    assert_nothing_is_left(scheduler)


def test_stock_async_scheduling_alternates_widths_there(config: VllmConfig):
    # Why the mixin holds such requests back. When this fails vLLM has fixed it: simplify.
    scheduler = make_scheduler(config, DiffusionAsyncScheduler, max_model_len=128)
    worker = CountingWorker()
    drive(scheduler, worker, [make_request("a", 128 - 50, 500)], canvas=CANVAS, depth=2)
    assert any(len(set(canvas.widths)) > 1 for canvas in worker.canvases)


@BOTH
def test_a_stop_token_ends_the_request_inside_a_canvas(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    scheduler = make_scheduler(config, scheduler_class)
    worker = CountingWorker(stop_at={"a": 20 + 40})
    tokens = drive(scheduler, worker, [make_request("a", 20, 200)], canvas=CANVAS, depth=depth)
    assert tokens["a"] == [TEXT] * 40 + [STOP]
    assert_nothing_is_left(scheduler)


@BOTH
@for_each(step=range(1, 9))
def test_an_abort_at_any_step_frees_everything_and_disturbs_nobody(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int, step: int
):
    scheduler, worker = make_scheduler(config, scheduler_class), CountingWorker()

    def abort(number: int) -> None:
        if number == step:
            scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)

    requests = [make_request("a", 20, 200), make_request("b", 40, 70)]
    tokens = drive(scheduler, worker, requests, canvas=CANVAS, depth=depth, between=abort)
    assert len(tokens["a"]) in {0, 32, 64}
    assert len(tokens["b"]) == 70
    assert widths_of(worker, "b") == [32, 32, 32]
    assert_nothing_is_left(scheduler)


# ---- commits ----


def rows_of(worker: CountingWorker, request: str) -> list[int]:
    return [rows[request] for rows in worker.forwards if request in rows]


@BOTH
@pytest.mark.parametrize("fused", [None, True, False])
def test_a_commit_runs_beside_the_next_canvas_where_it_can(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int, *, fused: bool | None
):
    scheduler, worker = make_scheduler(config, scheduler_class), CountingWorker()
    tokens = drive(
        scheduler, worker, [make_request("a", 10, 64, fused=fused)], canvas=CANVAS, depth=depth
    )
    assert len(tokens["a"]) == 64
    expected = {
        # The last step a canvas may take is seen coming while one step is in flight.
        "beside": [10, 32, 32, 32, 64, 32, 32],
        "behind": [10, 32, 32, 32, 32, 32, 32, 32],
        "separate": [10, *[32] * 8],
    }
    kind = "separate" if fused is False else "beside" if depth < 3 else "behind"
    # With steps in flight some run after the request has ended, unless its end was seen coming.
    rows, overhang = rows_of(worker, "a"), 0 if kind == "beside" else depth - 1
    assert rows[: len(expected[kind])] == expected[kind]
    assert len(rows) - len(expected[kind]) == overhang
    assert worker.ran["a", "fused"] == (kind == "beside")
    assert not worker.ran["a", "padded"]


@pytest.mark.parametrize("partial", [0, 12])
def test_rows_for_a_commit_that_does_not_come_are_padding(config: VllmConfig, partial: int):
    scheduler = make_scheduler(config, AsyncCanvasScheduler)
    worker = CountingWorker(partial=partial, cries_wolf=True)
    tokens = drive(scheduler, worker, [make_request("a", 10, 80)], canvas=CANVAS, depth=2)
    assert len(tokens["a"]) == 80
    # Behind the last canvas nothing is granted.
    assert rows_of(worker, "a")[:4] == [10, 32, 64, 64]
    assert worker.ran["a", "padded"] > 2
    # The next canvas cannot stand behind a part of one where its rows are already granted.
    assert worker.ran["a", "fused" if partial else "commit"] == 0
    assert worker.ran["a", "commit" if partial else "fused"] >= 2


def test_a_canvas_that_gives_a_part_is_committed_beside_the_next(config: VllmConfig):
    scheduler, worker = make_scheduler(config, CanvasScheduler), CountingWorker(partial=12)
    tokens = drive(scheduler, worker, [make_request("a", 10, 60)], canvas=CANVAS)
    assert len(tokens["a"]) == 60
    assert rows_of(worker, "a") == [10, 32, 32, 32, 52, 32, 32, 52, 32, 32]


@pytest.mark.parametrize(("budget", "rows"), [(63, [32, 32]), (64, [64])])
def test_a_commit_goes_ahead_where_both_do_not_fit(
    config: VllmConfig, budget: int, rows: list[int]
):
    scheduler, worker = make_scheduler(config, CanvasScheduler, budget=budget), CountingWorker()
    drive(scheduler, worker, [make_request("a", 10, 64)], canvas=CANVAS)
    assert rows_of(worker, "a") == [10, 32, 32, 32, *rows, 32, 32]


def test_beside_a_narrow_last_canvas_there_is_room_for_a_commit(config: VllmConfig):
    scheduler = make_scheduler(config, CanvasScheduler, budget=38, max_model_len=128)
    worker = CountingWorker()
    drive(scheduler, worker, [make_request("a", 90, 99)], canvas=CANVAS)
    assert rows_of(worker, "a") == [38, 38, 14, 32, 32, 32, 38, 6, 6]


def test_a_commit_that_does_not_fit_waits_with_its_canvas(config: VllmConfig):
    scheduler, worker = make_scheduler(config, CanvasScheduler, budget=70), CountingWorker()
    requests = [make_request("a", 10, 64), make_request("b", 10, 64), make_request("c", 10, 64)]
    drive(scheduler, worker, requests, canvas=CANVAS)
    for name in "abc":
        assert worker.ran[name, "denoise"] + worker.ran[name, "fused"] == 6
        assert worker.ran[name, "fused"] + worker.ran[name, "commit"] == 1
    assert sum(worker.ran[name, "commit"] for name in "abc") > 0


# ---- budget ----


@BOTH
@for_each(budget=[32, 33, 50, 63, 64, 100])
def test_a_budget_that_fits_no_whole_number_of_canvases_cuts_none(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int, budget: int
):
    scheduler, worker = make_scheduler(config, scheduler_class, budget=budget), CountingWorker()
    requests = [make_request(name, 10 + 23 * index, 70) for index, name in enumerate("abcd")]
    tokens = drive(scheduler, worker, requests, canvas=CANVAS, depth=depth)
    assert {len(given) for given in tokens.values()} == {70}
    for name in "abcd":
        assert widths_of(worker, name) == [32, 32, 32]
    assert max(sum(rows.values()) for rows in worker.forwards) <= budget
    assert_nothing_is_left(scheduler)


def test_the_stock_scheduler_cuts_canvases_there(config: VllmConfig):
    # Why the mixin exists. When this fails vLLM has fixed it: simplify.
    scheduler, worker = make_scheduler(config, DiffusionScheduler, budget=50), CountingWorker()
    requests = [make_request(name, 10, 70) for name in "abc"]
    drive(scheduler, worker, requests, canvas=CANVAS)
    assert {canvas.widths[0] for canvas in worker.canvases} != {32}


@BOTH
def test_canvases_that_fit_together_run_together(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    scheduler, worker = make_scheduler(config, scheduler_class, budget=70), CountingWorker()
    requests = [make_request(name, 10, 96) for name in "abc"]
    drive(scheduler, worker, requests, canvas=CANVAS, depth=depth)
    assert max(list(rows.values()).count(32) for rows in worker.forwards) == 2


@BOTH
def test_a_held_canvas_leaves_its_budget_to_prompts(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    scheduler, worker = make_scheduler(config, scheduler_class, budget=50), CountingWorker()
    requests = [make_request("a", 10, 96), make_request("b", 10, 96), make_request("c", 60, 32)]
    drive(scheduler, worker, requests, canvas=CANVAS, depth=depth)
    assert any(rows.get("a") == 32 and rows.get("c") == 18 for rows in worker.forwards)


@BOTH
def test_a_narrow_last_canvas_needs_no_more_than_its_rows(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    scheduler = make_scheduler(config, scheduler_class, budget=40, max_model_len=128)
    worker = CountingWorker(steps=8)
    requests = [make_request("wide", 10, 96), make_request("narrow", 122, 96)]
    drive(scheduler, worker, requests, canvas=CANVAS, depth=depth)
    assert any(rows == {"wide": 32, "narrow": 6} for rows in worker.forwards)


@pytest.mark.parametrize(("budget", "held"), [(51, True), (52, False)])
def test_a_canvas_behind_the_rest_of_a_prompt_gets_what_that_leaves(
    config: VllmConfig, budget: int, *, held: bool
):
    # Rare in a running engine: an image's encoder can make a prompt wait behind younger canvases.
    served = config

    class Bare(WholeCanvasMixin):
        max_num_scheduled_tokens, num_spec_tokens, max_model_len = budget, CANVAS, 512
        current_step = 5
        vllm_config = served
        structured_output_manager = SimpleNamespace(tokenizer=None)

    prompt, canvas = make_request("prompt", 30, 10), make_request("canvas", 40, 96)
    prompt.num_computed_tokens, canvas.num_computed_tokens = 10, 40
    scheduler = Bare()
    scheduler.running = [prompt, canvas]  # type: ignore[attr-defined]
    scheduler._admitted.update(dict.fromkeys((prompt, canvas), Admitted(rule=NO_RULE)))
    scheduler._defer_clipped_canvases()
    assert prompt.next_decode_eligible_step <= scheduler.current_step
    assert (canvas.next_decode_eligible_step == scheduler.current_step + 2) is held


@BOTH
def test_requests_of_different_widths_share_a_step(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    scheduler, worker = make_scheduler(config, scheduler_class, budget=48), CountingWorker()
    requests = [make_request("a", 10, 40), make_request("b", 10, 40, width=16)]
    tokens = drive(scheduler, worker, requests, canvas=CANVAS, depth=depth)
    assert {len(given) for given in tokens.values()} == {40}
    assert widths_of(worker, "b") == [16, 16, 16]
    assert any(rows == {"a": 32, "b": 16} for rows in worker.forwards)


# ---- memory ----


@BOTH
def test_requests_that_take_each_others_memory_come_back_and_end_the_same(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    scheduler = make_scheduler(config, scheduler_class, blocks=29, max_model_len=160)
    worker = CountingWorker()
    requests = [make_request(name, 60, 90) for name in "abc"]
    tokens = drive(scheduler, worker, requests, canvas=CANVAS, depth=depth)
    assert worker.preempted, "the cache was not tight enough to test anything"
    for name in "abc":
        assert len(tokens[name]) == 90
        assert widths_of(worker, name) == [32, 32, 32]
    assert_nothing_is_left(scheduler)


# ---- everything at once ----

request_shapes = st.lists(
    st.tuples(
        st.integers(1, 100),  # prompt
        st.integers(1, 120),  # max_tokens
        st.sampled_from([None, 1, 7, 16, 32]),  # its own width
        st.one_of(st.none(), st.integers(0, 100)),  # a stop token so far into the answer
        st.one_of(st.none(), st.integers(0, 60)),  # aborted before this step
        st.sampled_from([None, True, False]),  # commits beside the next canvas
    ),
    min_size=1,
    max_size=7,
)


@BOTH
def test_any_mix_of_requests_ends_with_whole_canvases_and_nothing_left(
    config: VllmConfig, scheduler_class: type[Scheduler], depth: int
):
    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(
        shapes=request_shapes,
        budget=st.integers(32, 130),
        max_model_len=st.integers(101, 160),
        spare_blocks=st.integers(0, 40),
        slots=st.integers(1, 5),
        steps=st.integers(1, 4),
        partial=st.sampled_from([0, 0, 3, 31]),
        cries_wolf=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
    )
    def check(
        *,
        shapes: list[tuple[int, int, int | None, int | None, int | None, bool | None]],
        budget: int,
        max_model_len: int,
        spare_blocks: int,
        slots: int,
        steps: int,
        partial: int,
        cries_wolf: bool,
        policy: str,
    ) -> None:
        scheduler = make_scheduler(
            config,
            scheduler_class,
            # At the least enough for one request alone, so that several preempt each other.
            blocks=2 * (max_model_len // BLOCK + 2) + 1 + spare_blocks,
            max_model_len=max_model_len,
            max_num_seqs=slots,
            budget=budget,
            policy=policy,
        )
        names = [f"r{index}" for index in range(len(shapes))]
        stops = {
            name: prompt + stop
            for name, (prompt, _, _, stop, _, _) in zip(names, shapes, strict=True)
            if stop is not None
        }
        aborts = {name: shape[4] for name, shape in zip(names, shapes, strict=True)}
        worker = CountingWorker(steps=steps, stop_at=stops, partial=partial, cries_wolf=cries_wolf)

        def abort(number: int) -> None:
            for name, when in aborts.items():
                if when == number:
                    scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

        requests = [
            make_request(name, prompt, max_tokens, width=width, fused=fused, priority=prompt % 3)
            for name, (prompt, max_tokens, width, _, _, fused) in zip(names, shapes, strict=True)
        ]
        tokens = drive(scheduler, worker, requests, canvas=CANVAS, depth=depth, between=abort)

        for name, shape in zip(names, shapes, strict=True):
            prompt, max_tokens, width, stop, when, _ = shape
            for canvas in (each for each in worker.canvases if each.request == name):
                expected = min(width or CANVAS, max_model_len - canvas.start)
                assert set(canvas.widths) == {expected}, canvas
            stopped = [stop + 1] if stop is not None else []
            wanted = min(max_tokens, max_model_len - prompt, *stopped)
            if when is None:
                assert len(tokens[name]) == wanted
                widths_of(worker, name)
            else:
                assert len(tokens[name]) <= wanted
        assert max((sum(rows.values()) for rows in worker.forwards), default=0) <= budget
        assert_nothing_is_left(scheduler)

    check()


# ---- in a running engine ----

SMALL: dict[str, Any] = {
    "max_model_len": 160,
    "limit_mm_per_prompt": {"image": 0, "video": 0},
}
TIGHT: dict[str, Any] = {
    **SMALL,
    "max_num_batched_tokens": 70,
    "block_size": 32,
    "num_gpu_blocks_override": 16,
}


@pytest.mark.slow
def test_a_tight_engine_cuts_no_canvas_and_gives_the_same_tokens(
    engine: Callable[..., LLM], parity_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = [{"prompt_token_ids": [300 + i] * length} for i, length in enumerate((33, 40, 3, 36))]
    sampling = [SamplingParams(max_tokens=96, ignore_eos=True, seed=i) for i in range(4)]

    def run(llm: LLM) -> list[list[int]]:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    roomy = run(engine(parity_checkpoint, **SMALL))

    steps: list[SchedulerOutput] = []
    schedule = CanvasScheduler.schedule

    def spy(self: CanvasScheduler, *args: Any) -> SchedulerOutput:
        steps.append(schedule(self, *args))
        return steps[-1]

    monkeypatch.setattr(CanvasScheduler, "schedule", spy)
    tight = run(engine(parity_checkpoint, **TIGHT))

    widths = {len(ids) for step in steps for ids in step.scheduled_spec_decode_tokens.values()}
    assert widths == {32}
    assert max(step.total_num_scheduled_tokens for step in steps) <= 70
    assert any(step.preempted_req_ids for step in steps), "the cache was not tight"
    assert tight == roomy
