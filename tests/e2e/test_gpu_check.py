"""`scripts/gpu-check --dry`: every stage runs its own code on a CPU host and says what it saw."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
STAGES = ("environment", "tests", "parity", "steps", "head", "recipe")


@pytest.mark.slow
@pytest.mark.vllm
def test_the_dry_form_runs_every_stage(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("on a GPU the check itself can run, and its dry form is not what CI runs")
    file = tmp_path / "found.json"
    run = subprocess.run(
        [sys.executable, str(PROGRAM), "--dry", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=1800,  # two minutes of work, on hosts that may be very busy
        check=False,
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said
    found = json.loads(file.read_text())
    assert {stage: found[f"{stage}.failure"] for stage in STAGES} == dict.fromkeys(STAGES), said

    # What a CPU can judge is judged.
    assert found["parity.trained.eager on cpu.equal"] > 0
    for checkpoint in ("trained", "random"):
        assert found[f"bars.{checkpoint}, eager on cpu: equal tokens.held"] is True
        assert found[f"bars.{checkpoint}, eager on cpu: entropy off.held"] is True
    # What only a GPU can say was run all the same, and is not.
    assert found["steps.ours.16.tokens_per_s"] > 0
    assert found["steps.ours.16.step_ms"] > 0
    assert found["steps.ours.16.waits"] is None
    assert found["tests.tests.count"] > 10
    assert found["recipe.recipe.ours.of_native"] > 0
    for bar in ("waits a step at 16 canvases", "recipe, ours: tokens/s over native's"):
        assert found[f"bars.{bar}.held"] is None
    assert found["provenance.commit"]
    assert found["provenance.torch"]

    lines = run.stdout.splitlines()
    assert lines[-1] == found["headline"]
    assert lines[-1].startswith("gpu-check (dry): nothing is below its bar")
    assert any("not judged: needs a GPU" in line for line in lines)
    for stage in STAGES:
        assert any(line.startswith(f"{stage}: ") for line in lines)
