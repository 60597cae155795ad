"""The demo is the main job: if it fails, a new user's first minute does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def run_demo(*arguments, timeout):
    return subprocess.run(
        [sys.executable, str(DEMO), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.server
@pytest.mark.slow
def test_demo_answers_rightly_over_http_streamed_and_offline():
    run = run_demo(timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"^ +(right|WRONG)$", run.stdout, re.MULTILINE) == ["right"] * 4
    counted = re.findall(r"(\d+) tokens in ([\d.]+) canvases, (\d+) forwards", run.stdout)
    *served, offline = [tuple(map(float, numbers)) for numbers in counted]
    assert [len(served), offline] == [4, tuple(map(sum, zip(*served, strict=True)))]
    assert "both answers are the same text" in run.stdout
    assert "the same answers as over HTTP" in run.stdout
    assert "first text" in run.stdout


@pytest.mark.server
def test_demo_shows_the_log_of_a_server_that_cannot_start(tmp_path):
    (tmp_path / "config.json").write_text('{"canvas_length": 8, "model_type": "no such model"}')
    run = run_demo("--checkpoint", str(tmp_path), timeout=200)
    assert run.returncode != 0
    assert "vllm serve ended with status" in run.stderr
    assert "no such model" in run.stderr
