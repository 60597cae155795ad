"""The example decides: over `/v1/systemone`, and a sudoku from one canvas, which is right."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DECIDE = Path(__file__).parents[2] / "examples" / "decide.py"


@pytest.mark.server
@pytest.mark.slow
def test_the_example_asks_three_questions_and_fills_a_sudoku_in_one_forward():
    run = subprocess.run(
        [sys.executable, str(DECIDE)], capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    bars = re.findall(r"^    (.+?) +#* +([01]\.\d\d)$", run.stdout, re.MULTILINE)
    labels = [name for name, _ in bars[:9]]
    assert labels == [
        *("yes", "no", "network", "billing", "login", "fine", "annoying", "bad", "on fire")
    ]
    for first, last in ((0, 2), (2, 5), (5, 9)):
        assert sum(float(share) for _, share in bars[first:last]) == pytest.approx(1, abs=0.02)
    assert len(bars[9:]) == 8
    assert all(float(share) > 0.5 for _, share in bars[9:])
    assert "1423/3214/4132/2341" in run.stdout
