"""What the head launches on a GPU at the released sizes, counted without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "head.py"


def test_the_two_products_dominate_a_step_of_the_head(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "roofline.json"
    subprocess.run(
        [sys.executable, str(PROGRAM), "--roofline", "--json", str(file)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    told = json.loads(file.read_text())
    ratios = {name: value for name, value in told.items() if name.endswith("ratio")}
    launches = {name: value for name, value in told.items() if name.endswith("launches")}
    assert len(ratios) == len(launches) == 27
    assert max(ratios.values()) <= 1.25, ratios
    assert max(value for name, value in launches.items() if name.startswith("bf16")) <= 30
    assert max(value for name, value in launches.items() if name.startswith("fp8")) <= 50
    of_bf16 = {
        name: value / told[name.replace("fp8", "bf16", 1)]
        for name, value in told.items()
        if name.startswith("fp8") and name.endswith("head ms")
    }
    assert len(of_bf16) == 9
    assert max(of_bf16.values()) < 0.95, of_bf16
