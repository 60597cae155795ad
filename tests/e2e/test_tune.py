"""`vllm-diffusion tune` on the trained checkpoint, as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from vllm_diffusion.testing.tasks import TASKS, held_out_items

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-diffusiongemma"
pytestmark = pytest.mark.vllm
ENGINE = {
    "max_model_len": 1024,
    "kv_cache_memory_bytes": 128 << 20,
    "dtype": "float32",
    "enforce_eager": True,
    # Entropies of a head in fewer bits are others, and so may be the thresholds that suit it.
    "additional_config": {"diffusion": {"head_weights": "nvfp4"}},
}
TUNE = "import sys; from vllm_diffusion.cli import main; sys.exit(main(sys.argv[1:]))"


def tune(*arguments: object, engine: object = ENGINE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TUNE, "tune", str(CHECKPOINT), *map(str, arguments)]
    command += ["--engine", json.dumps(engine)]
    run = subprocess.run(command, capture_output=True, check=False, timeout=500)
    # By hand: as text, the returns that a bar begins with would be ends of lines.
    out, err = run.stdout.decode(), run.stderr.decode()
    return subprocess.CompletedProcess(command, run.returncode, out, err)


def pairs(items):
    items = list(items)
    return zip(items[::2], items[1::2], strict=True)


@pytest.fixture
def task(tmp_path):
    file = tmp_path / "task.jsonl"
    people, sums = (
        held_out_items(name, 4, seed=5, sizes=TASKS[name].easy) for name in ("json", "chain")
    )
    # Two of each in a row, so that either half of a search has both.
    items = (item for pair in zip(pairs(people), pairs(sums), strict=True) for item in chain(*pair))
    lines = ({"prompt": item.prompt, "answer": item.answer, "max_tokens": 192} for item in items)
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.mark.slow
def test_it_finds_a_rule_with_fewer_forwards(task, tmp_path):
    figures = tmp_path / "figures.json"
    arms = ["--arm", "reference", "--arm", "max_steps=1", "--search", 1]
    run = tune("--task", task, *arms, "--json", figures)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(figures.read_text())
    reference, cut = told["tried"]["reference"], told["tried"]["max_steps=1"]
    assert (reference["items"], reference["score"]) == (4, 100)
    assert cut["steps"] == 1
    assert cut["score"] < reference["score"]
    # A step that only sees that nothing changed is one that this model can do without.
    assert told["tried"]["reference,stability_threshold=0"]["tpf_all"] > reference["tpf_all"]
    assert "reference,stability_threshold=2" not in told["tried"]  # more than is served
    first, second = told["confirmed"].values()
    assert first["score"] == 100
    fewer = second["score"] == 100 and second["tpf_all"] > first["tpf_all"]
    assert told["best"] == (second if fewer else first)["options"]
    assert f"for a request:  {json.dumps(told['best'])}" in run.stdout
    served = {name.removeprefix("diffusion_"): value for name, value in told["best"].items()}
    served = {"diffusion": {"head_weights": "nvfp4", **served}}
    assert f"for the engine: --additional-config '{json.dumps(served)}'" in run.stdout
    # Two tables and the rule on stdout, one line and its bars on stderr; nothing of the engine's.
    row = r"( *score %| *\d+\.\d).*"
    for line in run.stdout.splitlines():
        assert re.fullmatch(rf"|\d+ items|{row}|for (a request|the engine): .*", line), line
    first, bars = run.stderr.split("\n", 1)
    assert re.fullmatch(r"Starting the engine; its log is in \S+ \(-v shows it here\)\.", first)
    assert "reference: " in bars
    assert "\n" not in bars


@pytest.mark.slow
def test_what_an_engine_refuses_ends_it_in_one_line(task):
    run = tune("--task", task, "--n", 2, "--arm", "stability_threshold=2")
    assert run.returncode == 2
    assert run.stdout.splitlines()[-1] == (
        "the engine refuses: diffusion_stability_threshold must be at most the served 1, got 2"
    )
    assert "INFO" not in run.stdout


@pytest.mark.slow
def test_an_engine_that_finds_too_little_memory_names_the_option_of_this_command(task):
    # More than there is, on whatever host: some of it is in use.
    run = tune("--task", task, engine={"max_model_len": 1024, "gpu_memory_utilization": 1.0})
    assert run.returncode == 2
    reason, way_out, log = run.stdout.splitlines()
    assert reason.startswith(f"the engine of {CHECKPOINT} did not start: Available memory on node")
    assert """--engine '{"max_model_len": 1024, "gpu_memory_utilization": 0.""" in way_out
    assert '"kv_cache_memory_bytes": ' in way_out
    file = Path(re.fullmatch(r"The log is in (\S+)\.", log)[1])
    assert "Traceback" in file.read_text()
    file.unlink()
