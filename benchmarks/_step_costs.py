"""Device syncs, launches and kernels of a denoising step, by torch's profiler.

Takes an engine in this process. Returns, per step: syncs of the launching thread, launches by the
host, and kernels. The model's forward is counted separately: a forward that is one captured graph
is one launch. The engine is unchanged, except that three of its calls are marked as ranges in the
profile.
"""
# ruff: noqa: ANN401 - wraps functions of vLLM, which are not followed by a type checker

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

STEP, FORWARD, READ_BACK = (f"vllm-diffusion {what}" for what in ("step", "forward", "read back"))

SETTLING = 6
"""Steps until every prompt is read and every canvas denoises."""
WATCHED = 8
"""Steps that are counted. A canvas of 16 steps outlives both."""

_WAIT = re.compile(
    r"cu(da)?(Stream|Device|Ctx|Event)Synchronize(_\w+)?|cu(da)?Memcpy(2D|[HD]to[HD])?(_\w+)?"
)
_LAUNCH = re.compile(
    r"cu(da)?(LaunchKernel(ExC?)?|LaunchCooperativeKernel|GraphLaunch|Mem(cpy|set)\w*Async)(_\w+)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """Of an average step; what a device would say is None where there is none."""

    waits: float | None
    """Calls that return when the device has got there, but for the one that reads the last step."""
    read_backs: float | None
    """Those of vLLM's own, for what the step before found."""
    launches: float | None
    """Kernels, graphs, copies and fills that the host launches outside the forward."""
    kernels: float | None
    """That ran outside the forward, those inside graphs counted."""
    forward_launches: float | None
    """1 where the forward is one captured graph."""
    forward_kernels: float | None
    step_ms: float
    """From one step to the next by the host's clock, the profiler's own cost included."""
    busy_ms: float | None
    """Of the device, overlapping work counted once."""


@dataclass(frozen=True, slots=True)
class _Spans:
    """Half-open ranges of one thread's time, in order, none within another."""

    starts: list[float]
    ends: list[float]

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> _Spans:
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
        return cls([start for start, _ in spans], [end for _, end in spans])

    def __contains__(self, time: float) -> bool:
        at = bisect_right(self.starts, time) - 1
        return at >= 0 and time < self.ends[at]


def account(events: Iterable[Mapping[str, Any]]) -> StepCosts:
    """Sum up a profile.

    Args:
        events: of a Chrome trace, times in microseconds.

    Raises:
        ValueError: no step was watched.
    """
    complete = [event for event in events if event.get("ph") == "X"]

    def spans(name: str) -> list[Mapping[str, Any]]:
        kind = ("user_annotation", "cpu_op")
        return [e for e in complete if e["name"] == name and e.get("cat") in kind]

    watched = spans(STEP)
    if not watched:
        raise ValueError("the profile holds no step")
    thread = watched[0]["tid"]
    steps, forward, reading = (_Spans.of(spans(name)) for name in (STEP, FORWARD, READ_BACK))
    found = dict.fromkeys(("waits", "read_backs", "launches", "forward_launches"), 0)
    # Of a launch, by the number that what it started bears: whether it is the forward's.
    launched: dict[int, bool] = {}
    for call in complete:
        if call.get("cat") not in {"cuda_runtime", "cuda_driver"} or call["tid"] != thread:
            continue
        if call["ts"] not in steps:
            continue
        if _WAIT.fullmatch(call["name"]):
            found["read_backs" if call["ts"] in reading else "waits"] += 1
        elif _LAUNCH.fullmatch(call["name"]):
            within = call["ts"] in forward
            found["forward_launches" if within else "launches"] += 1
            launched[call["args"]["correlation"]] = within
    kernels = {True: 0, False: 0}
    device = []
    for event in complete:
        within = launched.get(event.get("args", {}).get("correlation"))
        if within is None or event.get("cat") not in {"kernel", "gpu_memcpy", "gpu_memset"}:
            continue
        device.append((event["ts"], event["ts"] + event["dur"]))
        kernels[within] += event["cat"] == "kernel"
    count, last = len(watched), steps.ends[-1]
    return StepCosts(
        **{name: number / count for name, number in found.items()},
        kernels=kernels[False] / count,
        forward_kernels=kernels[True] / count,
        step_ms=(last - steps.starts[0]) / count / 1000,
        busy_ms=_covered(device) / count / 1000,
    )


def _covered(spans: list[tuple[float, float]]) -> float:
    total, behind = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, behind))
        behind = max(behind, end)
    return total


def count(llm: Any, prompts: Sequence[Any], *, new_tokens: int) -> StepCosts:
    """Denoise so many canvases at once and count some steps in which none begins or ends.

    Args:
        llm: an idle engine of this process whose canvases take at least 16 steps.
        prompts: one a canvas.
        new_tokens: of a request.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    names = [f"watched-{len(prompts)}-{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        asked = prompt if isinstance(prompt, dict) else {"prompt": prompt}
        engine.add_request(name, asked, sampling)
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with ExitStack() as stack:
        _name_ranges(llm, stack.enter_context)
        for _ in range(SETTLING):
            engine.step()
        with profile(activities=activities) as profiled:
            for _ in range(WATCHED):
                with record_function(STEP):
                    engine.step()
            if gpu:
                torch.cuda.synchronize()
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "profile.json")
        profiled.export_chrome_trace(str(file))
        costs = account(json.loads(file.read_text())["traceEvents"])
    if gpu:
        return costs
    return replace(costs, **{f.name: None for f in fields(costs) if f.name != "step_ms"})


def _name_ranges(llm: Any, enter: Callable[[Any], Any]) -> None:
    """Let the profile say what is the forward, and what reads back the last step."""
    from torch.profiler import record_function
    from vllm.v1.worker.gpu.async_utils import AsyncOutput

    executor = llm.llm_engine.engine_core.engine_core.model_executor
    runner = executor.driver_worker.worker.model_runner

    def named(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return inner(*args, **kwargs)

        return call

    enter(patch.object(runner.model, "forward", named(FORWARD, runner.model.forward)))
    graphs = runner.cudagraph_manager
    if graphs is not None:
        enter(patch.object(graphs, "run_fullgraph", named(FORWARD, graphs.run_fullgraph)))
    enter(patch.object(AsyncOutput, "get_output", named(READ_BACK, AsyncOutput.get_output)))
