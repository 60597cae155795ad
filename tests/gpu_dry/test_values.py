"""Tokens of the pretended GPU are those of the CPU engine, which tests/engine holds to a model."""

from __future__ import annotations

import math

import pytest

from gpu_dry.cases import FIRST, LLADA, OPTIONS, PLAIN, SDAR_FIRST, SECOND, THIRD
from gpu_dry.jobs import reference_of

RUNS = ["triton-eager", "triton-full", "flash-full", "flash-piecewise"]
# Options that wait for nothing at all.
FREE = ["nothing", "temperature", "greedy", "soft embedding of few"]
EVERY = [*FIRST, *SECOND, *THIRD]
OF_FAMILIES = {"sdar-full": [*SDAR_FIRST, *SECOND, *THIRD], "llada-eager": [*LLADA]}
EACH = [
    pytest.param(
        f"values-{run}",
        name,
        id=f"{run}-{name}",
        marks=pytest.mark.jobs(reference_of(f"values-{run}")),
    )
    for run, names in {**dict.fromkeys(RUNS, EVERY), **OF_FAMILIES}.items()
    for name in names
]


@pytest.mark.parametrize(("job", "name"), EACH)
def test_tokens_are_those_of_the_cpu_engine(report, job, name):
    expected = report(reference_of(job))["answers"][name]
    found = report(job)["answers"][name]
    assert found["tokens"] == expected["tokens"]
    assert len(found["logprobs"]) == len(expected["logprobs"])
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        assert all(math.isclose(a, b, abs_tol=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("job", [f"values-{run}" for run in RUNS])
def test_the_runs_are_what_they_are_called(report, job):
    found = report(job)
    assert found["attention"] == ["FLASH_ATTN 4" if "flash" in job else "TRITON_ATTN"]
    assert (found["replays"] > 0) == ("eager" not in job)
    assert found["asynchronous"] == (job != "values-triton-full")
    assert found["answers"]["prefix hit"]["cached"] >= 32
    assert found["answers"]["prefix hit, whole"]["cached"] >= 64
    assert found["preemptions"] > 0


@pytest.mark.parametrize("run", OF_FAMILIES)
def test_runs_of_families_are_what_they_are_called(report, run):
    found = report(f"values-{run}")
    assert found["attention"] == ["TRITON_ATTN"]
    assert (found["replays"] > 0) == ("eager" not in run)
    assert not found["asynchronous"]
    if run == "sdar-full":
        assert found["answers"]["prefix hit"]["cached"] >= 32
        assert found["answers"]["prefix hit, whole"]["cached"] >= 64


@pytest.mark.jobs("values-options")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_with_an_option_waits_once_at_most(report, name):
    (asked,) = [one for one in report("values-options")["rounds"] if one["names"] == [name]]
    assert asked["steps"] >= 8
    most = 0 if name in FREE else asked["steps"]
    assert sum(asked["waits"].values()) <= most, asked["waits"]


@pytest.mark.jobs("values-reference")
@pytest.mark.parametrize("job", ["values-buffer", "values-range"])
def test_a_mistake_shows(report, job):
    """A buffer made anew behind a graph; canvases without their range of keys."""
    expected, found = report("values-reference")["answers"], report(job)["answers"]
    assert [n for n in PLAIN if found[n]["tokens"] != expected[n]["tokens"]] != []


@pytest.mark.jobs("shapes-wait")
def test_a_wait_on_the_hot_path_shows(report):
    waits = report("shapes-wait")["runs"]["bf16-text"]["canvases"]["1"]["waits"]
    assert any("_local_scalar_dense" in what for what in waits)
