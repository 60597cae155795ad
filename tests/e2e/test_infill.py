"""The example fills, inserts and edits as it says, with a model that was really trained."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

INFILL = Path(__file__).parents[2] / "examples" / "infill.py"


@pytest.mark.vllm
@pytest.mark.slow
def test_the_example_fills_inserts_and_edits_rightly():
    run = subprocess.run(
        [sys.executable, str(INFILL)], capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    said = dict(re.findall(r"^(template|sudoku|suffix|draft) +(.*)$", run.stdout, re.MULTILINE))
    assert said == {
        "template": '[{"name":"Rosa","age":55,"city":"Madrid","job":"clerk"}]',
        "sudoku": "2431/3124/1243/4312",
        "suffix": '[{"name":"Rosa","age":55',
        "draft": "Carol, 23, is a nurse in Madrid.",
    }
