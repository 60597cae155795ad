"""One cell of a benchmark's table, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

LONGEST = 1800  # seconds


def measure(program: str, *arguments: str, environment: Mapping[str, str], name: str) -> Any:  # noqa: ANN401 - JSON
    """Run a program on this interpreter and read the JSON of its last line.

    Args:
        program: its file.
        arguments: of its command line.
        environment: beside that of this process.
        name: what is measured, for the message with which a failure ends this program too.
    """
    result = subprocess.run(
        [sys.executable, program, *arguments],
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=LONGEST,
    )
    if result.returncode:
        sys.exit(f"{name} failed with status {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])
