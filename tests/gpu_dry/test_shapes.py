"""The released sizes on three generations of GPUs, without numbers: what starts, runs, compiles."""

from __future__ import annotations

import pytest

from gpu_dry.device import GPUS
from gpu_dry.jobs import FAMILIES, FORMS, JOBS

RUNS = [
    pytest.param(f"shapes-{gpu}", f"{form}-{what}", id=f"{gpu}-{form}-{what}")
    for gpu in GPUS
    for form in FORMS
    for what in ("text", "images")
]

# Of a GPU, with images and without. FlashAttention 4 takes heads of 256 and 512 on Hopper only.
ATTENTION = {"sm_90": ["FLASH_ATTN 4"], "sm_100": ["TRITON_ATTN"], "sm_120": ["TRITON_ATTN"]}
# Of families whose text is not causal: no ranges, so vLLM's own choice.
OF_FAMILIES = {"sm_90": ["FLASH_ATTN 4"], "sm_100": ["FLASH_ATTN 4"], "sm_120": ["FLASH_ATTN 2"]}

EXPERTS = {
    ("sm_90", "bf16"): ["TRITON"],
    ("sm_90", "fp8"): ["VLLM_CUTLASS"],
    ("sm_90", "nvfp4"): ["HUMMING"],
    ("sm_100", "bf16"): ["FLASHINFER_CUTLASS"],
    ("sm_100", "fp8"): ["VLLM_CUTLASS"],
    ("sm_100", "nvfp4"): ["FLASHINFER_TRTLLM"],
    ("sm_120", "bf16"): ["FLASHINFER_CUTLASS"],
    ("sm_120", "fp8"): ["TRITON"],
    ("sm_120", "nvfp4"): ["FLASHINFER_CUTLASS"],
}


def run_of(report, job, run):
    found = report(job)["runs"][run]
    assert "error" not in found, found["error"]
    return found


@pytest.mark.parametrize(("job", "run"), RUNS)
def test_every_number_of_canvases_replays_a_graph(report, job, run):
    found = run_of(report, job, run)
    most = JOBS[job]["runs"][run]["canvases"]
    assert [int(count) for count in found["canvases"]] == list(range(1, most + 1))
    eager = [
        count
        for count, steps in found["canvases"].items()
        if steps["forwards_replayed"] != steps["steps"]
    ]
    assert eager == [], "numbers of canvases whose forward is launched kernel by kernel"


@pytest.mark.parametrize(("job", "run"), RUNS)
def test_backends_by_name(report, job, run):
    found, gpu = run_of(report, job, run), job.removeprefix("shapes-")
    assert found["attention"] == ATTENTION[gpu]
    assert found["experts"] == EXPERTS[gpu, run.split("-")[0]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gpu", GPUS)
def test_families_on_vllms_layers(report, gpu, family):
    """On a grid whole steps replay a graph; where all text runs in every step, none does."""
    found = run_of(report, f"shapes-{gpu}", family)
    assert found["attention"] == OF_FAMILIES[gpu]
    for steps in found["canvases"].values():
        assert steps["forwards_replayed"] == (steps["steps"] if family == "sdar" else 0)


@pytest.mark.parametrize("gpu", GPUS)
def test_a_prompt_on_a_grid_is_cut_by_one_copy(report, gpu):
    """And one kernel, which brings the pages of its blocks."""
    found = run_of(report, f"shapes-{gpu}", "sdar")
    assert found["prompt"]["waits"] == {}
    assert found["prompt"]["operators"]["prepare_attn"] == {"_to_copy": 1, "triton:_gather": 1}


@pytest.mark.parametrize("job", [f"shapes-{gpu}" for gpu in GPUS])
def test_our_kernels_fit_the_target(report, job):
    found = report(job)
    assert found["failed"] == {}
    ours = [kernel for kernel in found["kernels"] if kernel["ours"]]
    assert ours, "no kernel of ours was launched"
    gpu = job.removeprefix("shapes-")
    for kernel in ours:
        assert kernel["target"].startswith(gpu)
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= GPUS[gpu].shared, kernel
