"""What the tests ask of the pretended GPUs: one process a job, started once, two at a time.

A job is a program of this folder and a specification for it; its report is what tests look at.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pathlib import Path

GPUS: Final = ("sm_90", "sm_100", "sm_120")
FORMS: Final = {"bf16": None, "fp8": "fp8-dynamic", "nvfp4": "nvfp4"}
CANVASES: Final = 16
"""Of the engines whose steps are counted; the others stop at `FEW`."""
FEW: Final = 3
COUNTED: Final = (1, 4, 16)
FAMILIES: Final = {"sdar": 4096, "llada": 128}
"""Families whose layers are vLLM's, and how much is asked for: all of a request's rows run in every
step of LLaDA, and so those of 16 fit in one."""
BLOCKS: Final = 26
"""Of the cache where numbers are compared: too few for all requests at once."""


def shapes(gpu: str) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    for form, name in FORMS.items():
        for images in (False, True):
            counted = form == "bf16" and not images
            runs[f"{form}-{'images' if images else 'text'}"] = {
                "family": "diffusion_gemma",
                "form": name,
                "images": images,
                "canvases": CANVASES if counted else FEW,
                "fused": counted,
            }
    for family, tokens in FAMILIES.items():
        runs[family] = {
            "family": family,
            "images": None,
            "canvases": CANVASES,
            "at": COUNTED,
            "tokens": tokens,
        }
    return {"program": "run_shapes", "gpu": gpu, "runs": runs}


def native(gpu: str) -> dict[str, Any]:
    run = {"images": False, "canvases": CANVASES, "at": COUNTED, "family": "diffusion_gemma"}
    return {"program": "run_shapes", "gpu": gpu, "native": True, "runs": {"bf16-text": run}}


def values(
    gpu: str | None,
    *,
    family: str = "diffusion_gemma",
    cases: str = "all",
    graphs: str = "NONE",
    wait: bool = False,
    plant: str | None = None,
) -> dict[str, Any]:
    """An engine with numbers; `wait` has it scheduled synchronously, no GPU means the reference."""
    options: dict[str, Any] = {"async_scheduling": not wait}
    if cases in {"all", "sdar"}:
        options["num_gpu_blocks_override"] = BLOCKS
    if family != "diffusion_gemma":  # whose own settings choose
        options["attention_backend"] = "TRITON_ATTN"
    return {
        "program": "run_values",
        "gpu": gpu,
        "family": family,
        "cases": cases,
        "graphs": graphs,
        "plant": plant,
        "options": options,
        "environment": {"VLLM_USE_BREAKABLE_CUDAGRAPH": str(int(graphs == "PIECEWISE"))},
    }


VALUES: Final[dict[str, dict[str, Any]]] = {
    "values-reference": values(None),
    "values-triton-eager": values("sm_120"),
    "values-triton-full": values("sm_120", graphs="FULL_DECODE_ONLY", wait=True),
    "values-flash-full": values("sm_90", graphs="FULL_DECODE_ONLY"),
    "values-flash-piecewise": values("sm_90", graphs="PIECEWISE"),
    "values-options": values("sm_120", cases="options"),
    "values-buffer": values(
        "sm_120", cases="plain", graphs="FULL_DECODE_ONLY", plant="buffer made anew"
    ),
    "values-range": values("sm_120", cases="plain", plant="missing range"),
    "values-sdar-reference": values(None, family="sdar", cases="sdar", wait=True),
    "values-sdar-full": values(
        "sm_120", family="sdar", cases="sdar", graphs="FULL_DECODE_ONLY", wait=True
    ),
    "values-llada-reference": values(None, family="llada", cases="llada", wait=True),
    "values-llada-eager": values("sm_120", family="llada", cases="llada", wait=True),
}

JOBS: Final[dict[str, dict[str, Any]]] = {
    **{f"shapes-{gpu}": shapes(gpu) for gpu in GPUS},
    **{f"native-{gpu}": native(gpu) for gpu in ("sm_90", "sm_120")},
    "shapes-wait": {
        "program": "run_shapes",
        "gpu": "sm_120",
        "plant": "wait on the hot path",
        "runs": {"bf16-text": {"family": "diffusion_gemma", "images": False, "canvases": 1}},
    },
    **{f"trace-{gpu}": {"program": "run_trace", "gpu": gpu} for gpu in ("sm_90", "sm_120")},
    **VALUES,
}


def reference_of(job: str) -> str:
    """The job whose tokens a job's must be."""
    family = JOBS[job]["family"]
    return "values-reference" if family == "diffusion_gemma" else f"values-{family}-reference"


class Pool:
    """Runs jobs by name in processes of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        workers = int(os.environ.get("GPU_DRY_PROCESSES") or min(2, os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(workers)
        self._jobs: dict[str, Future[dict[str, Any]]] = {}
        self._making = threading.Lock()

    def start(self, name: str) -> Future[dict[str, Any]]:
        if name not in self._jobs:
            self._jobs[name] = self._pool.submit(self._run, name)
        return self._jobs[name]

    def report(self, name: str) -> dict[str, Any]:
        """Of a job, waited for. Raises RuntimeError with the end of what it said if it broke."""
        return self.start(name).result()

    def finished(self) -> dict[str, dict[str, Any]]:
        return {
            name: job.result()
            for name, job in self._jobs.items()
            if job.done() and not job.cancelled() and job.exception() is None
        }

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _checkpoint(self, family: str) -> str:
        """The small random checkpoint, made once."""
        from gpu_dry.cases import MADE

        with self._making:
            folder = self.folder / "checkpoints" / family
            if not folder.exists():
                maker, spec = MADE[family]
                maker.make_tiny_checkpoint(folder, spec)
        return str(folder)

    def _run(self, name: str) -> dict[str, Any]:
        job = JOBS[name]
        folder = self.folder / name
        folder.mkdir(parents=True)
        asked, report = folder / "asked.json", folder / "report.json"
        environment = os.environ | job.get("environment", {})
        python = sys.executable
        if job["program"] == "run_values":
            job = job | {"checkpoint": self._checkpoint(job["family"])}
            if job["gpu"] is None:
                python = os.environ["GPU_DRY_REFERENCE"]
                environment.pop("LD_LIBRARY_PATH", None)
        asked.write_text(json.dumps(job))
        if job.get("native"):
            environment["VLLM_DIFFUSION"] = "0"
        program = [python, "-m", f"gpu_dry.{job['program']}", str(asked), str(report)]
        with (folder / "log.txt").open("w") as log:
            code = subprocess.run(
                program,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        if code or not report.exists():
            end = (folder / "log.txt").read_text()[-4000:]
            raise RuntimeError(f"job {name} ended with {code}:\n{end}")
        return json.loads(report.read_text())
