"""What an answer and the metrics say of canvases is what the engine ran."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.engines import DEFAULTS
from helpers.inside import Inside
from helpers.parity import ENGINE, SPEC, make_prompt
from helpers.probe import Probe
from helpers.scheduling import (
    CountingWorker,
    assert_nothing_is_left,
    drive,
    make_request,
    make_scheduler,
)
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm import SamplingParams

from vllm_diffusion.engine.committed import CommittedCanvases
from vllm_diffusion.engine.scheduler import AsyncCanvasScheduler, CanvasScheduler
from vllm_diffusion.records import Emission, StopReason
from vllm_diffusion.telemetry import KEY, OPTION, CanvasReport, Report, Telemetry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm import LLM
    from vllm.config import VllmConfig
    from vllm.outputs import CompletionOutput
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

pytestmark = pytest.mark.vllm

CANVAS = SPEC.canvas
ASK = {OPTION: True}


# ---- worker to scheduler ----


def test_the_record_of_a_step_travels_as_integers():
    emission = Emission(
        tokens=torch.zeros(3, 4),
        count=torch.tensor([0, 4, 3]),
        steps=torch.tensor([0, 48, 2]),
        reason=torch.tensor([9, StopReason.STEPS, StopReason.SETTLED]),
        entropy=torch.tensor([1.0, torch.nan, 0.0625]),
    )
    record = CommittedCanvases.of(emission, torch.tensor([3, 0, 2]), 4).to_cpu_nonblocking()
    assert record.facts.dtype == torch.int32
    assert record.tolists(np.array([4, 0, 3, 0])) == {
        0: CanvasReport(steps=48, stopped_by="steps", entropy=None, tokens=4),
        2: CanvasReport(steps=2, stopped_by="settled", entropy=0.0625, tokens=3),
    }
    assert record.tolists(np.zeros(4, dtype=np.int32)) == {}


# ---- scheduler ----


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> VllmConfig:
    from vllm import EngineArgs

    text_only = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    return EngineArgs(str(tiny_checkpoint), **(DEFAULTS | text_only)).create_engine_config()


class TellingWorker(CountingWorker):
    """Also hands over the record of every canvas that leaves, and counts rows."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.rows: Counter[str] = Counter()

    def execute(self, scheduled: SchedulerOutput) -> tuple[ModelRunnerOutput, DraftTokenIds | None]:
        output, drafts = super().execute(scheduled)
        output.sampling_masks = {}  # type: ignore[assignment]
        for index, (request, tokens) in enumerate(
            zip(output.req_ids, output.sampled_token_ids, strict=True)
        ):
            if self.decodes(request):
                self.rows[request] += scheduled.num_scheduled_tokens[request]
            if tokens:
                output.sampling_masks[index] = CanvasReport(  # type: ignore[index]
                    steps=self.steps, stopped_by="settled", entropy=0.5, tokens=len(tokens)
                )
        return output, drafts


def reports_of(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Report | None]]:
    """The reports of every output that leaves the scheduler from now on, by request."""
    reports: dict[str, list[Report | None]] = {}
    update = scheduler.update_from_output

    def spy(*args: Any) -> Any:
        leaving = update(*args)
        for group in leaving.values():
            for output in group.outputs:
                wire = (output.kv_transfer_params or {}).get(KEY)
                report = None if wire is None else Report.from_wire(wire)
                reports.setdefault(output.request_id, []).append(report)
        return leaving

    monkeypatch.setattr(scheduler, "update_from_output", spy)
    return reports


@pytest.mark.parametrize("budget", [512, 60], ids=["roomy", "commits go ahead"])
@pytest.mark.parametrize(
    ("scheduler_class", "depth"), [(CanvasScheduler, 1), (AsyncCanvasScheduler, 2)]
)
def test_reports_add_up_to_what_the_worker_ran(
    config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
    scheduler_class: type[Scheduler],
    depth: int,
    budget: int,
):
    # Little room, and canvases that do not grow together: one is cut short for another.
    scheduler = make_scheduler(config, scheduler_class, blocks=36, budget=budget)
    reports = reports_of(scheduler, monkeypatch)
    fused = {number: [None, False][number % 2] for number in range(4)}
    requests = [
        make_request(f"r{number}", 30 + 50 * number, 70, fused=fused[number]) for number in range(4)
    ]
    worker = TellingWorker(steps=3)
    drive(scheduler, worker, requests, canvas=32, depth=depth)
    assert_nothing_is_left(scheduler)
    started_over = {}
    for number, request in enumerate(requests):
        told = Telemetry()
        for report in reports[request.request_id]:
            assert report is not None
            assert not report.asked
            told.add(report)
        name = request.request_id
        assert told.commit_forwards == worker.ran[name, "commit"]
        # With two steps in flight the last one runs after the answer has ended, for nothing.
        denoised = worker.ran[name, "denoise"] + worker.ran[name, "fused"]
        assert denoised - told.denoise_forwards in range(depth)
        assert worker.rows[name] - told.rows in range(0, 32 * depth, 32)
        assert all(canvas.tokens == 32 for canvas in told.canvases)
        assert len(told.canvases) == 3
        started_over[name] = told.denoise_forwards - 3 * len(told.canvases)
        if fused[number] is False:
            assert told.commit_forwards == 3
            continue
        assert worker.ran[name, "fused"] + told.commit_forwards <= 2
        if depth == 1:
            assert (budget > 64) == (told.commit_forwards == 0)
        else:
            assert budget > 64 or not worker.ran[name, "fused"]
    # One preempted between two canvases starts none over.
    assert {name for name, lost in started_over.items() if lost} <= worker.preempted
    assert any(started_over.values()) or budget < 64, "no canvas was cut short"
    assert not scheduler._meter._meter._counts, "a request was not forgotten"


def test_without_statistics_only_those_who_ask_are_counted(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
):
    scheduler = make_scheduler(config, CanvasScheduler, log_stats=False)
    reports = reports_of(scheduler, monkeypatch)
    asker, other = make_request("asker", 20, 64), make_request("other", 21, 64)
    asker.sampling_params.extra_args = ASK
    drive(scheduler, TellingWorker(steps=2), [asker, other], canvas=32)
    assert [report and report.asked for report in reports["asker"]] == [True, True]
    assert reports["other"] == [None, None]


# ---- an engine ----


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    """With a cache that is too small for six requests."""
    options = ENGINE | {"max_model_len": 224, "num_gpu_blocks_override": 40}
    return engine(parity_checkpoint, **options, disable_log_stats=False)


def told_in(completion: CompletionOutput) -> Telemetry:
    telemetry: Telemetry = completion.diffusion  # type: ignore[attr-defined]
    return telemetry


def sampling(seed: int, **options: Any) -> SamplingParams:
    return SamplingParams(seed=seed, **({"max_tokens": 2 * CANVAS, "ignore_eos": True} | options))


def metrics() -> dict[tuple[str, str], float]:
    """Samples of the metrics that count canvases, by name and reason or kind."""
    return {
        (sample.name, sample.labels.get("reason", sample.labels.get("kind", ""))): sample.value
        for family in text_string_to_metric_families(generate_latest().decode())
        if family.name.startswith("vllm:diffusion")
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def test_a_mixed_batch_with_preemption_tells_what_ran(llm: LLM):
    prompts = [make_prompt(length, length) for length in (3, 31, 64, 120, 90, 12)]
    before = metrics()
    asking = [number % 2 == 0 for number in range(6)]
    wishes: list[dict[str, Any]] = [ASK if asks else {} for asks in asking]
    wishes[2] = ASK | {"diffusion_max_steps": 2}
    wishes[4] = ASK | {"diffusion_canvas_length": 7, "diffusion_fused_commit": False}
    wants = [
        sampling(2**41 + number, max_tokens=3 * CANVAS, extra_args=wish)
        for number, wish in enumerate(wishes)
    ]
    with Probe() as probe:
        answers = llm.generate([{"prompt_token_ids": each} for each in prompts], wants)
    assert probe.preemptions > 0, "the cache was large enough for all: nothing was preempted"
    ran, committed, apart = 0, 0, 0
    for number, answer in enumerate(answers):
        run = probe.run(2**41 + number)
        steps = sum(len(attempt) for attempt in run.attempts)
        separate = wishes[number].get("diffusion_fused_commit") is False
        ran, committed = ran + steps, committed + len(run.commits)
        apart += separate * len(run.commits)
        assert answer.kv_transfer_params is None
        if not asking[number]:
            assert not hasattr(answer.outputs[0], KEY)
            continue
        told = told_in(answer.outputs[0])
        assert told.denoise_forwards == steps
        assert told.commit_forwards == separate * len(run.commits)
        assert len(run.commits) == len(told.canvases)
        assert [canvas.steps for canvas in told.canvases] == [len(each) for each in run.canvases]
        assert [canvas.tokens for canvas in told.canvases] == [
            len(tokens) for _, tokens in run.commits
        ]
        if number == 2:
            assert {canvas.stopped_by for canvas in told.canvases} == {"steps"}
    after = metrics()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    assert grown["vllm:diffusion_forwards_total", "denoise"] == ran
    assert grown["vllm:diffusion_forwards_total", "commit"] == apart
    assert grown["vllm:diffusion_denoise_steps_per_canvas_count", ""] == committed
    assert grown["vllm:diffusion_canvas_entropy_count", ""] == committed
    assert grown["vllm:diffusion_tokens_per_forward_count", ""] == len(answers)
    # vLLM's own counter has both kinds.
    assert grown["vllm:diffusion_num_denoising_steps_total", ""] == ran + apart


def test_every_one_of_several_answers_tells_its_own(llm: LLM):
    rule = Inside(llm).model_state.pool.default
    prompt = make_prompt(9, 9)
    with Probe() as probe:
        (answer,) = llm.generate([{"prompt_token_ids": prompt}], sampling(5, n=2, extra_args=ASK))
    for completion in answer.outputs:
        run = probe.run(5 + completion.index)
        told = told_in(completion)
        assert [canvas.steps for canvas in told.canvases] == [len(each) for each in run.attempts]
        for canvas, attempt in zip(told.canvases, run.attempts, strict=True):
            last = attempt[-1]
            heat = rule.t_min + (rule.t_max - rule.t_min) * (1 - last.step / rule.max_steps)
            log_prob = (last.logits / heat).log_softmax(dim=-1)
            entropy = -(log_prob.exp() * log_prob).sum(dim=-1).mean()
            assert canvas.entropy == pytest.approx(float(entropy), abs=1e-5)
    assert told_in(answer.outputs[0]) is not told_in(answer.outputs[1])
