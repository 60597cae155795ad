"""Programs whose Triton kernels run in Triton's interpreter, which must be chosen before import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def interpreted(program: str) -> str:
    """The last line that a file prints; skips where Triton has no interpreter."""
    pytest.importorskip("triton.runtime.interpreter", reason="Triton has no interpreter")
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]
