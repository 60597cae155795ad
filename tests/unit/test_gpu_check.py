"""`scripts/gpu-check`: every bar can fail, no stage stops another, a profile adds up."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cases import for_each

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _programs():
    """The benchmarks import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


# ---- bars ----

STEPS = {
    f"{engine}.{canvases}.{name}": value
    for canvases in (1, 4, 16)
    for engine, speed in (("ours", 1000.0), ("native", 900.0))
    for name, value in {
        "tokens_per_s": speed,
        "waits": 0.0,
        "launches": 60.0,
        "kernels": 150.0,
        "forward_launches": 1.0,
    }.items()
}
HEAD = {"256": {"products_ms": 1.0, "head_ms": 1.2}, "4096": {"products_ms": 12.0, "head_ms": 15.0}}
PARITY = {
    "trained.eager on cuda.equal": 256,
    "trained.eager on cuda.tokens": 256,
    "trained.eager on cuda.entropy": 9e-6,
    "trained.eager on cuda.peer": None,
    "wide.bfloat16 on cuda.equal": None,
    "wide.bfloat16 on cuda.tokens": None,
    "wide.bfloat16 on cuda.entropy": 0.02,
    "wide.bfloat16 on cuda.peer": 0.015,
}
RECIPE = {
    "form": "FP8",
    "published": 1008.0,
    "recipe.ours.tokens_per_s": 1100.0,
    "recipe.ours.of_native": 1.05,
    "recipe.native.of_native": 1.0,
    "adaptive.ours, fast.of_native": 1.4,
}


def missed(bars):
    return [bar.name for bar in bars if bar.held is False]


def test_results_that_are_good_enough_hold_every_bar():
    import _gpu_stages

    bars = [
        *_gpu_stages.step_bars(STEPS),
        *_gpu_stages.head_bars(HEAD),
        *_gpu_stages.parity_bars(PARITY),
        *_gpu_stages.recipe_bars(RECIPE),
    ]
    assert missed(bars) == []
    assert len(bars) == 15 + 2 + 3 + 3


@pytest.mark.parametrize(
    ("kind", "key", "value", "name"),
    [
        ("step_bars", "ours.16.waits", 0.125, "waits a step at 16 canvases"),
        ("step_bars", "ours.4.launches", 60.5, "host launches a step at 4 canvases"),
        ("step_bars", "ours.1.kernels", 151.0, "kernels beside the forward at 1 canvas"),
        ("step_bars", "ours.16.kernels", 201.0, "kernels beside the forward at 16 canvases"),
        ("step_bars", "ours.16.forward_launches", 90.0, "launches of the forward at 16 canvases"),
        ("step_bars", "native.4.tokens_per_s", 1001.0, "tokens/s over native's at 4 canvases"),
        ("step_bars", "native.1.tokens_per_s", None, "tokens/s over native's at 1 canvas"),
        ("step_bars", "ours.1.waits", None, "waits a step at 1 canvas"),
        ("step_bars", "ours.1.waits", float("nan"), "waits a step at 1 canvas"),
        (
            "head_bars",
            "256",
            {"products_ms": 1.0, "head_ms": 1.26},
            "head over its products at 256 rows",
        ),
        (
            "parity_bars",
            "trained.eager on cuda.equal",
            255,
            "trained, eager on cuda: equal tokens",
        ),
        (
            "parity_bars",
            "trained.eager on cuda.entropy",
            2e-4,
            "trained, eager on cuda: entropy off",
        ),
        (
            "parity_bars",
            "wide.bfloat16 on cuda.entropy",
            0.031,
            "wide, bfloat16 on cuda: error over Transformers' own",
        ),
        (
            "parity_bars",
            "wide.bfloat16 on cuda.entropy",
            None,
            "wide, bfloat16 on cuda: error over Transformers' own",
        ),
        ("recipe_bars", "recipe.ours.tokens_per_s", 1000.0, "tokens/s of the recipe"),
        (
            "recipe_bars",
            "adaptive.ours, fast.of_native",
            0.99,
            "adaptive, ours, fast: tokens/s over native's",
        ),
    ],
)
def test_every_bar_can_be_missed_alone(kind, key, value, name):
    import _gpu_stages

    good = {"step_bars": STEPS, "head_bars": HEAD, "parity_bars": PARITY, "recipe_bars": RECIPE}
    assert missed(getattr(_gpu_stages, kind)({**good[kind], key: value})) == [name]


def test_a_recipe_that_ours_did_not_run_is_a_missed_bar():
    import _gpu_stages

    bars = _gpu_stages.recipe_bars({"form": "bf16", "published": None})
    assert missed(bars) == ["recipe, ours: tokens/s over native's"]


def test_a_bar_that_cannot_be_judged_here_is_neither_held_nor_missed():
    import _gpu_stages

    bars = _gpu_stages.step_bars({}, why_not="needs a GPU")
    assert {bar.held for bar in bars} == {None}
    assert missed(_gpu_stages.step_bars({})) == [bar.name for bar in bars]


def test_tests_that_ran_are_counted_and_none_is_none():
    import _gpu_stages

    assert (
        _gpu_stages.tests_passed("...\n12 passed, 3 skipped, 99 deselected in 4s", dry=False) == 12
    )
    assert _gpu_stages.tests_passed("3 skipped, 99 deselected in 4s", dry=False) == 0
    assert _gpu_stages.tests_passed("24/3000 tests collected (2976 deselected)", dry=True) == 24


def test_the_estimate_beside_a_measured_head_is_that_of_its_gpu_and_rows():
    import _gpu_stages
    import _roofline

    flat = _roofline.flat(
        [
            {
                "form": form,
                "GPU": name,
                "canvases": canvases,
                "head ms": (1.5 if form == "bf16" else 1.2) * canvases,
                "ratio": 1.1,
            }
            for form in _roofline.FORMS
            for name in _roofline.GPUS
            for canvases in _roofline.CANVASES
        ]
    )
    found = _gpu_stages.estimate_of("NVIDIA H200", flat)
    assert {rows: row["head ms"] for rows, row in found.items()} == {256: 1.5, 1024: 6, 4096: 24}
    assert len(_gpu_stages.estimate_of("NVIDIA GeForce RTX 5090", flat)) == 3
    assert _gpu_stages.estimate_of("NVIDIA B200", flat) == {}


# ---- stages ----


def test_a_stage_that_fails_stops_no_other_and_is_in_the_verdict(tmp_path):
    import gpu_check
    from _bars import Bar, Stage, run_stage, verdict

    def good(found, _):
        found.values["seen"] = 1
        found.bars.append(Bar(name="speed", value=2.0, limit=1.0, at_least=True))

    def dies(found, bounded):
        found.bars.append(Bar(name="half a result", value=1.0, limit=1.0))
        bounded.run("a program", [sys.executable, "-c", "print('why'); raise SystemExit(3)"])

    def is_broken(_, __):
        raise KeyError("a result that is not there")

    def never_ends(_, bounded):
        bounded.run("a sleeper", [sys.executable, "-c", "import time; time.sleep(60)"])

    started = time.monotonic()
    outcomes = [
        run_stage(Stage(name=name, asks="?", limit_s=limit, answer=answer), tmp_path)
        for name, limit, answer in (
            ("dies", 30, dies),
            ("broken", 30, is_broken),
            ("slow", 1, never_ends),
            ("good", 30, good),
        )
    ]
    assert time.monotonic() - started < 30
    line, fine = verdict(outcomes)
    assert not fine
    for part in (
        "BELOW ITS BAR",
        "dies: a program failed with status 3",
        "broken: KeyError",
        "slow: a sleeper was not done when the stage's 1 s were over",
        "2 bars held",
    ):
        assert part in line
    assert "\n" not in line
    written = gpu_check.document(outcomes, line)
    assert written["good.seen"] == 1
    assert written["good.failure"] is None
    assert written["dies.failure"] == "a program failed with status 3"
    assert written["bars.half a result.held"] is True
    assert "why" in (tmp_path / "dies.log").read_text()

    assert verdict(outcomes[3:]) == ("nothing is below its bar: 1 bars held", True)
    outcomes[3].found.bars.append(Bar(name="waits", value=0.125, limit=0))
    assert verdict(outcomes[3:]) == ("BELOW ITS BAR: waits 0.125, at most 0 (1 bars held)", False)


def test_the_stages_without_a_checkpoint_take_ten_minutes_at_most(tmp_path):
    import gpu_check

    asked = gpu_check.stages(gpu_check.parse([]), tmp_path)
    assert [stage.name for stage in asked] == ["environment", "tests", "parity", "steps", "head"]
    assert sum(stage.limit_s for stage in asked) <= 600
    with_weights = gpu_check.stages(gpu_check.parse(["a/checkpoint"]), tmp_path)
    assert [stage.name for stage in with_weights][-1] == "recipe"


def test_the_exit_status_is_1_if_a_bar_is_missed(monkeypatch, tmp_path, capsys):
    import gpu_check
    from _bars import Bar, Stage

    value = {"waits": 0.0}

    def stages(options, _):
        assert isinstance(options, argparse.Namespace)

        def answer(found, _):
            found.bars.append(Bar(name="waits", value=value["waits"], limit=0))

        return [Stage(name="steps", asks="?", limit_s=5, answer=answer)]

    monkeypatch.setattr(gpu_check, "stages", stages)
    monkeypatch.setattr(sys, "argv", ["gpu-check", "--dry", "--json", str(tmp_path / "out.json")])
    assert gpu_check.main() == 0
    value["waits"] = 1.0
    assert gpu_check.main() == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("gpu-check (dry): BELOW ITS BAR")
    assert json.loads((tmp_path / "out.json").read_text())["bars.waits.held"] is False


# ---- what a profile says ----

MAIN, OTHER = 7, 8  # threads


def event(cat, name, start, length=1.0, thread=MAIN, **args):
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": start,
        "dur": length,
        "tid": thread,
        "args": args,
    }


def profile(*extra, graphed=True):
    """Two steps of 100 us: a forward, then a kernel, a graph of two kernels, a copy, one read."""
    events = [{"ph": "M", "name": "process_name", "args": {}}]
    for step in range(2):
        at, first = 1000.0 + 100 * step, 10 * step

        def runtime(name, after, number, at=at, first=first):
            return event("cuda_runtime", name, at + after, correlation=first + number)

        events += [
            event("user_annotation", "vllm-diffusion step", at, 100.0),
            event("user_annotation", "vllm-diffusion forward", at + 10, 20.0),
            runtime("cudaGraphLaunch" if graphed else "cudaLaunchKernel", 12, 1),
            runtime("cudaLaunchKernelExC", 40, 2),
            runtime("cudaGraphLaunch", 50, 3),
            runtime("cudaMemcpyAsync", 60, 4),
            event("user_annotation", "vllm-diffusion read back", at + 70, 20.0),
            runtime("cudaEventSynchronize", 75, 5),
            runtime("cudaEventRecord", 76, 6),
        ]
        for number, kernels in ((1, 5), (2, 1), (3, 2)):
            events += [
                event("kernel", "k", at + 20 + 10 * number, correlation=first + number)
                for _ in range(kernels)
            ]
        events.append(event("gpu_memcpy", "m", at + 90, correlation=first + 4))
    return [*events, *extra]


def test_a_profile_adds_up():
    from _step_costs import account

    costs = account(profile())
    assert (costs.waits, costs.read_backs) == (0, 1)
    assert (costs.launches, costs.kernels) == (3, 3)
    assert (costs.forward_launches, costs.forward_kernels) == (1, 5)
    assert costs.step_ms == pytest.approx(0.1)
    assert costs.busy_ms == pytest.approx(0.004)  # what overlaps counts once


@for_each(
    name=[
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cudaMemcpy",
        "cuStreamSynchronize",
        "cuMemcpyDtoH_v2",
    ]
)
def test_a_wait_of_the_launching_thread_within_a_step_counts(name):
    from _step_costs import account

    within = event("cuda_runtime", name, 1105.0, correlation=77)
    assert account(profile(within)).waits == 0.5
    for elsewhere in ({**within, "tid": OTHER}, {**within, "ts": 1300.0}):
        assert account(profile(elsewhere)).waits == 0


def test_a_forward_that_is_no_graph_is_seen():
    from _step_costs import account

    second = event("cuda_driver", "cuLaunchKernelEx", 1015.0, correlation=90)
    assert account(profile(second, graphed=False)).forward_launches == 1.5


def test_a_profile_without_steps_is_refused():
    from _step_costs import account

    with pytest.raises(ValueError, match="no step"):
        account(event("kernel", "k", 1.0) for _ in range(3))


# ---- the recipe ----


def test_what_was_published_is_compared_with_its_own_gpu_and_form_alone():
    from recipe import form_of, published_for

    fp8 = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    nvfp4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    forms = [form_of({"quantization_config": q}) for q in (fp8, nvfp4)]
    assert forms == ["FP8", "NVFP4"]
    assert form_of({}) == "bf16"
    assert published_for("NVIDIA H100 80GB HBM3", "FP8") == 1008
    assert published_for("NVIDIA H200", "FP8") == 1288
    assert published_for("NVIDIA GeForce RTX 5090", "NVFP4") == 700
    assert published_for("NVIDIA H200", "bf16") is None
    assert published_for("NVIDIA B200", "FP8") is None


def test_two_engines_share_a_gpu_that_holds_both(monkeypatch, tmp_path):
    import _report
    from recipe import shares

    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(27 * 2**30)  # a hole, not 27 GiB
    for total, apart in (("143771 MiB", False), ("81559 MiB", False), ("32607 MiB", True)):
        monkeypatch.setattr(_report, "gpu", lambda total=total: {"gpu.memory.total": total})
        assert shares(tmp_path)[0] is apart


def test_engines_take_turns_in_turn(monkeypatch):
    import recipe

    asked = []

    class Worker:
        def __init__(self, engine, *_):
            self.engine = engine
            asked.append(f"start {engine}")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            asked.append(f"end {self.engine}")

        def ask(self, number):
            asked.append(f"{self.engine} {number}")
            return {self.engine: {"seconds": 1.0, "tokens": 2, "forwards": 1.0}}

    monkeypatch.setattr(recipe, "Worker", Worker)
    plan = recipe.Plan(
        checkpoint="c",
        phase="recipe",
        generation_config="auto",
        memory=0.46,
        prompt_tokens=1,
        new_tokens=1,
    )
    assert len(list(recipe.in_turn(("a", "b"), plan, 2, apart=False))) == 4
    assert asked == ["start a", "a 0", "start b", "b 0", "b 1", "a 1", "end b", "end a"]
    asked.clear()
    list(recipe.in_turn(("a", "b"), replace(plan, memory=0.92), 1, apart=True))
    assert asked == ["start a", "a 0", "end a", "start b", "b 0", "end b"]


def test_an_engine_that_does_not_start_costs_its_own_numbers_alone(monkeypatch, tmp_path, capsys):
    import _report
    import recipe

    class Worker:
        def __init__(self, engine, *_):
            self.engine = engine

        def __enter__(self):
            if self.engine == "native":
                sys.exit("native failed with status 1")
            return self

        def __exit__(self, *_):
            pass

        def ask(self, _):
            return {self.engine: {"seconds": 1.0, "tokens": 1200, "forwards": 68.0}}

    monkeypatch.setattr(recipe, "Worker", Worker)
    monkeypatch.setattr(_report, "gpu", lambda: {"gpu.name": "NVIDIA H100 80GB HBM3"})
    packed = {"quantization_config": {"format": "float-quantized"}}
    (tmp_path / "config.json").write_text(json.dumps(packed))
    plan = recipe.Plan(
        checkpoint="c",
        phase="recipe",
        generation_config="auto",
        memory=0.46,
        prompt_tokens=1,
        new_tokens=1,
    )
    found = {}
    for arm, measured in recipe.in_turn(("ours", "native"), plan, 3, apart=False):
        found.setdefault(("recipe", arm), []).append(measured)
    assert list(found) == [("recipe", "ours")]
    recipe.report(found, tmp_path, tmp_path / "out.json")
    assert "published 1008" in capsys.readouterr().out

    import _gpu_stages

    result = json.loads((tmp_path / "out.json").read_text())
    bars = _gpu_stages.recipe_bars(result)
    assert {bar.name: bar.held for bar in bars} == {
        "tokens/s of the recipe": True,
        "recipe, ours: tokens/s over native's": False,
    }
