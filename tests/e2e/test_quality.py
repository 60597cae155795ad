"""The instrument sees what it must: rules that are known to lose quality are seen to lose it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_diffusion.denoise.presets import preset_names

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ITEMS = 60
TASKS = ("json", "sudoku", "chain")
ENGINES = ("ours", "native", "transformers")
BAD = ("cut-2", "cut-4", "freeze-0.6", "no-renoise")
FUSED, SEPARATE = (f"fused_commit={form}" for form in ("true", "false"))


def quality(tmp_path, presets, *arguments):
    words = [word for preset in presets for word in ("--preset", preset)]
    words += [word for task in TASKS for word in ("--task", task)]
    return benchmark(tmp_path, "quality.py", *words, *arguments, "--n", str(ITEMS))


def benchmark(tmp_path, program, *arguments):
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    run = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads((tmp_path / "out.json").read_text()), run.stdout


@pytest.fixture(scope="module")
def hard(tmp_path_factory):
    """Every rule on the same hard items: figures, table, plot."""
    folder = tmp_path_factory.mktemp("hard")
    arms = ("reference", *BAD, *(preset for preset in preset_names() if preset != "reference"))
    return *quality(
        folder, arms, "--sizes", "hard", "--plot", str(folder / "p.png")
    ), folder / "p.png"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every engine, ours with both forms of a commit, on items of all sizes: figures, table."""
    engines = [word for engine in ENGINES for word in ("--engine", engine)]
    return quality(tmp_path_factory.mktemp("whole"), (FUSED, SEPARATE), *engines)


@pytest.mark.slow
@pytest.mark.vllm
def test_known_bad_rules_lose_significantly_on_hard_items(hard):
    found, table, plot = hard
    assert 50 <= found["ours:reference.all.exact"] <= 90, table
    for preset in BAD:
        loss, error = (-found[f"ours:{preset}.all.diff"], found[f"ours:{preset}.all.diff_error"])
        assert loss > 2 * error > 0, table
    assert plot.stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.vllm
def test_presets_save_forwards_or_take_care(hard):
    found, table, _ = hard
    # Without the commits, which no preset changes.
    speed = {preset: found[f"ours:{preset}.all.TPF_denoise"] for preset in preset_names()}
    assert speed["gentle"] < speed["reference"] < speed["balanced"] < speed["fast"], table
    assert speed["balanced"] > 1.05 * speed["reference"], table
    for preset, granted in {"gentle": 0, "balanced": 0, "fast": 2}.items():
        gain, error = (found[f"ours:{preset}.all.{name}"] for name in ("diff", "diff_error"))
        assert gain > -granted - 3 * error, table


@pytest.mark.slow
@pytest.mark.vllm
def test_ours_answers_as_well_as_transformers_and_native_loses_on_long_sums(whole):
    found, table = whole
    difference, error = (found[f"transformers.all.{name}"] for name in ("diff", "diff_error"))
    assert abs(difference) <= 3 * error, table
    # The prompt and three canvases of sums pass the sliding window, which native moves along.
    loss, error = (-found["native.chain.diff"], found["native.chain.diff_error"])
    assert loss > 2 * error > 0, table
    assert found[f"ours:{FUSED}.all.exact"] > 75, table
    assert found[f"ours:{FUSED}.all.finished"] > 95, table


@pytest.mark.slow
@pytest.mark.vllm
def test_fused_commits_save_forwards_and_change_no_answer(whole):
    found, table = whole
    separate, fused = (f"ours:{arm}.chain" for arm in (SEPARATE, FUSED))
    assert found[f"{separate}.diff"] == found[f"{separate}.diff_error"] == 0, table
    for same in ("exact", "finished", "steps", "TPF_denoise"):
        assert found[f"{fused}.{same}"] == found[f"{separate}.{same}"], table
    # Sixteen pairs of canvases fit into a step, so no commit goes ahead alone.
    assert found[f"{fused}.TPF_all"] == found[f"{fused}.TPF_denoise"], table
    assert found[f"{separate}.TPF_all"] < 0.95 * found[f"{fused}.TPF_all"], table


@pytest.mark.slow
@pytest.mark.vllm
def test_the_loop_of_the_branches_is_the_engine_s(tmp_path):
    found, table = benchmark(tmp_path, "branches.py", "--quick", "--branches", "1", "2", "--engine")
    for preset in ("reference", "balanced"):
        assert found[f"{preset}.unlike engine"] == 0, table
        two = f"{preset}.2.all"
        assert found[f"{two}.of one"] < 1 < found[f"{two}.rows of one"] < 2, table


@pytest.mark.slow
@pytest.mark.vllm
def test_presets_on_the_trained_model_take_fewer_forwards(tmp_path):
    arguments = ("--trained", "--quick", "--engines", "ours")
    found, table = benchmark(tmp_path, "engine.py", *arguments)
    for at_once in (1, 8):
        apart, fused, fewer = (
            {name: found[f"{arm}.{at_once}.{name}"] for name in ("forwards", "rows", "exact %")}
            for arm in ("reference, commits apart", "reference", "balanced")
        )
        assert fused["exact %"] == apart["exact %"], table
        assert fewer["forwards"] < fused["forwards"] < apart["forwards"], table
        # Only the last canvas of an answer is not committed: the other commits still have rows.
        assert fused["rows"] == apart["rows"] - 64, table
