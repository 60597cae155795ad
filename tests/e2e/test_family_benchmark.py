"""Every family beside its reference loop: the program runs, and no token differs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_diffusion.models import family_modules

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "families.py"


@pytest.mark.vllm
@pytest.mark.slow
def test_every_family_gives_the_tokens_of_its_reference(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    run = subprocess.run(
        [sys.executable, str(BENCHMARK), "--quick", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(file.read_text())
    names = {module.__name__.split(".")[-2] for module in family_modules()}
    assert {key.partition(".")[0] for key in found} >= names, "a family has no reference loop"
    for name in names:
        for loop in ("ours, one at a time", "ours, all at once"):
            assert found[f"{name}.{loop}.compared"] >= 64
            assert found[f"{name}.{loop}.different"] == 0, run.stdout
            assert found[f"{name}.{loop}.tokens_per_forward"] >= 1, run.stdout
    # A plain run of the rule takes the forwards that its definition takes.
    for name in names - {"diffusion_gemma"}:
        for loop in ("ours, one at a time", "ours, all at once"):
            assert found[f"{name}.{loop}.forwards"] == found[f"{name}.reference.forwards"]
