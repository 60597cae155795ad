"""The demo is the main job: if it fails, a new user's first minute does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@pytest.mark.server
@pytest.mark.slow
def test_demo_serves_streams_and_chats_with_one_answer(tiny_checkpoint):
    command = [sys.executable, str(DEMO), "--checkpoint", str(tiny_checkpoint)]
    run = subprocess.run(
        [*command, "--max-tokens", "64", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    counted = re.findall(r"(\d+) tokens in ([\d.]+) canvases, (\d+) forwards", run.stdout)
    assert len(counted) == 3, run.stdout
    assert len(set(counted)) == 1, "blocking, streamed and offline took different ways"
    assert "both answers are the same text" in run.stdout
    assert "first text" in run.stdout


@pytest.mark.server
def test_demo_shows_the_log_of_a_server_that_cannot_start(tmp_path):
    (tmp_path / "config.json").write_text('{"canvas_length": 8, "model_type": "no such model"}')
    run = subprocess.run(
        [sys.executable, str(DEMO), "--checkpoint", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode != 0
    assert "vllm serve ended with status" in run.stderr
    assert "no such model" in run.stderr
