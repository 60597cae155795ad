"""What a denoising step may cost beside its forward; the numbers are those of docs/gpu.md."""

from __future__ import annotations

import pytest

from gpu_dry.jobs import COUNTED, FAMILIES, GPUS

STEPS = [
    pytest.param(f"shapes-{gpu}", run, str(count), id=f"{gpu}-{run}-{count}")
    for gpu in GPUS
    for run in ("bf16-text", *FAMILIES)
    for count in COUNTED
]
LAUNCHES, HEAD, ATTENTION = 60, 50, 15
FUSED = 72
KERNELS = {"1": 150, "4": 200, "16": 200}


def step_of(report, job, run, count):
    found = report(job)["runs"][run]
    assert "error" not in found, found["error"]
    return found["canvases"][count]


def a_step(steps, what, region):
    return steps[what][region] / steps["steps"]


def outside(steps, what):
    return a_step(steps, what, "all") - a_step(steps, what, "forward")


@pytest.mark.parametrize(("job", "run", "count"), STEPS)
def test_a_plain_step_never_waits(report, job, run, count):
    assert step_of(report, job, run, count)["waits"] == {}


@pytest.mark.parametrize(("job", "run", "count"), STEPS)
def test_launches_beside_the_forward(report, job, run, count):
    assert outside(step_of(report, job, run, count), "launches") <= LAUNCHES


@pytest.mark.parametrize(("job", "run", "count"), STEPS)
def test_kernels_beside_the_forward(report, job, run, count):
    assert outside(step_of(report, job, run, count), "kernels") <= KERNELS[count]


@pytest.mark.parametrize(("job", "run", "count"), STEPS)
def test_kernels_of_the_head(report, job, run, count):
    assert a_step(step_of(report, job, run, count), "kernels", "head") <= HEAD


@pytest.mark.parametrize(("job", "run", "count"), STEPS)
def test_kernels_of_the_attention_metadata(report, job, run, count):
    assert a_step(step_of(report, job, run, count), "kernels", "prepare_attn") <= ATTENTION


@pytest.mark.parametrize("job", [f"shapes-{gpu}" for gpu in GPUS])
def test_a_step_that_commits_beside_a_canvas(report, job):
    """It brings in what is committed, and cuts a request in two; its forward is in pieces."""
    steps = report(job)["runs"]["bf16-text"]["fused"]
    fused = [step for step in steps if "triton:_place" in step["operators"]["prepare_inputs"]]
    assert fused
    for step in fused:
        assert step["waits"] == {}
        assert outside(step, "launches") <= FUSED


@pytest.mark.parametrize("job", ["native-sm_90", "native-sm_120"])
def test_native_is_counted_in_the_same_run(report, job):
    found = report(job)["runs"]["bf16-text"]
    assert "error" not in found, found["error"]
    assert set(found["canvases"]) == {str(count) for count in COUNTED}
