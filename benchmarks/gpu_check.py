"""One look at this host's GPU: whether the plugin is right on it, and as fast as it must be.

    scripts/gpu-check [CHECKPOINT] [--dry] [--json FILE] [--stages NAME ...]

    environment  a GPU is there, vLLM is one that was tested, the plugin is on
    tests        the tests that need a GPU
    parity       tokens and entropies against Transformers (`device_parity.py`)
    steps        waits, launches and kernels of a denoising step by torch's profiler, and tokens
                 per second, beside native vLLM at the released widths (`engine.py --steps`)
    head         the head beside its two products alone
    recipe       with CHECKPOINT: the published recipe, then the presets (`recipe.py`)

Without a checkpoint at most ten minutes on one H100, H200 or RTX 5090 whose environment is made.
Every stage has a limit of its own and cannot stop another. Prints a table a stage, a table of bars
and one line that says what is below its bar; writes all of it as JSON with its provenance. The exit
status is 1 if a bar is missed or a stage failed.

`--dry` runs the same program on a CPU host in a minute or two: the same commands on small sizes;
what only a GPU can say is named and not judged.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report
from _bars import Bar, Bounded, Findings, Outcome, Stage, StageError, run_stage, verdict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

HERE = Path(__file__).parent
ROOT = HERE.parent
CANVASES = (1, 4, 16)
HEAD_ROWS = (256, 1024, 4096)
NO_GPU = "needs a GPU"

MOST_WAITS, MOST_LAUNCHES = 0, 60
MOST_KERNELS = {1: 150, 4: 150 + 50 * 3 / 15, 16: 200}
"""By canvases; between those that were asked for, in proportion."""
MOST_OF_PRODUCTS = 1.25
LEAST_OF_NATIVE = 1.0
MOST_NATS = 1e-4
"""Between two engines in fp32; rounding leaves 1e-5."""
MOST_OF_PEER = 2.0
"""What ours may be off in bf16, of what Transformers is off itself."""

GPU_TESTS = ("tests/ops", "tests/unit", "tests/engine")


def main() -> int:
    """Run the stages; 1 if a bar is missed."""
    options = parse(sys.argv[1:])
    if not options.dry and not _report.gpu():
        print("gpu-check: nvidia-smi finds no GPU here; --dry runs without one", file=sys.stderr)
        return 2
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        for stage in stages(options, Path(name)):
            print(f"\n{stage.name}: {stage.asks}", flush=True)
            outcomes.append(run_stage(stage, Path(name)))
            show(outcomes[-1])
    line, fine = sum_up(outcomes, options)
    options.json.write_text(json.dumps(document(outcomes, line), indent=2) + "\n")
    print(f"\nwritten to {options.json}\n{line}")
    return 0 if fine else 1


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu-check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", nargs="?", help="the released one, a folder or a name")
    parser.add_argument("--dry", action="store_true", help="on a CPU host, in small")
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), metavar="FILE")
    parser.add_argument("--stages", nargs="+", metavar="NAME", choices=list(LIMITS))
    return parser.parse_args(arguments)


LIMITS = {"environment": 60, "tests": 110, "parity": 170, "steps": 200, "head": 60, "recipe": 1500}
"""Seconds; ten minutes for all but the last, which only a checkpoint asks for."""
PATIENCE = 4
"""Times as long may a dry stage take: it takes seconds, but CI hosts are busy."""


def stages(options: argparse.Namespace, folder: Path) -> list[Stage]:
    """What this run asks, in order."""
    dry = options.dry
    every = {
        "environment": ("what is here?", partial(environment, dry=dry)),
        "tests": ("do the tests pass that need a GPU?", partial(tests, dry=dry)),
        "parity": ("does it write what Transformers writes?", partial(parity, folder, dry=dry)),
        "steps": (
            "what does a step cost, and is it faster than native?",
            partial(steps, folder, dry=dry),
        ),
        "head": ("how far is the head from its two products?", partial(head, dry=dry)),
        "recipe": (
            "is the published speed reached?",
            partial(recipe, folder, options.checkpoint, dry=dry),
        ),
    }
    wanted = options.stages or [
        name for name in every if name != "recipe" or options.checkpoint or dry
    ]
    return [
        Stage(
            name=name,
            asks=every[name][0],
            limit_s=LIMITS[name] * (PATIENCE if dry else 1),
            answer=every[name][1],
        )
        for name in every
        if name in wanted
    ]


# ---- the stages ----


def python(program: str, *arguments: str) -> list[str]:
    """The command line of a program of this folder."""
    return [sys.executable, str(HERE / program), *arguments]


def environment(found: Findings, bounded: Bounded, *, dry: bool) -> None:
    """What `vllm-diffusion doctor` says, and the GPU."""
    doctor = Path(sys.executable).with_name("vllm-diffusion")
    said = bounded.run("vllm-diffusion doctor", [str(doctor), "doctor"])
    found.notes += said.splitlines()
    found.values |= _report.gpu()
    found.rows = [
        {"what": key, "here": value} for key, value in _report.provenance().items() if value
    ]
    there = float(bool(_report.gpu()))
    found.bars.append(
        Bar(name="GPUs", value=there, limit=1, at_least=True, why_not=NO_GPU if dry else "")
    )


def tests(found: Findings, bounded: Bounded, *, dry: bool) -> None:
    """Pytest on what is marked `gpu`."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
        *GPU_TESTS,
    ]
    command = [*command, "--rootdir", str(ROOT)]
    paths = [str(ROOT / part) if part in GPU_TESTS else part for part in command]
    said = bounded.run("pytest -m gpu", [*paths, *(["--collect-only"] if dry else [])])
    summary = said.strip().splitlines()[-1]
    found.notes.append(f"would run: {summary}" if dry else summary)
    count = tests_passed(said, dry=dry)
    found.values["tests.count"] = count
    found.bars.append(
        Bar(
            name="GPU tests that ran",
            value=count,
            limit=1,
            at_least=True,
            why_not=NO_GPU if dry else "",
        )
    )


def tests_passed(said: str, *, dry: bool) -> int:
    """How many tests pytest's last line says passed, or were found."""
    pattern = r"(\d+)(?:/\d+)? tests? collected" if dry else r"(\d+) passed"
    found = re.search(pattern, said.strip().splitlines()[-1])
    return int(found[1]) if found else 0


def parity(folder: Path, found: Findings, bounded: Bounded, *, dry: bool) -> None:
    """`device_parity.py`."""
    file = folder / "parity.json"
    quick = ["--quick"] if dry else []
    said = bounded.run("device_parity.py", python("device_parity.py", *quick, "--json", str(file)))
    found.notes += said.strip().splitlines()
    found.values |= (result := read(file))
    found.bars += parity_bars(result)


def parity_bars(result: Mapping[str, Any]) -> list[Bar]:
    """Of every checkpoint and way: all tokens, and no more off than rounding."""
    bars = []
    for key in (name.removesuffix(".tokens") for name in result if name.endswith(".tokens")):
        checkpoint, way = key.split(".", 1)
        equal, tokens, entropy, peer = (
            result[f"{key}.{field}"] for field in ("equal", "tokens", "entropy", "peer")
        )
        name = f"{checkpoint}, {way}"
        if tokens is not None:
            share = equal / tokens
            bars.append(Bar(name=f"{name}: equal tokens", value=share, limit=1, at_least=True))
        if peer is not None:
            ratio = None if entropy is None else entropy / peer
            bars.append(
                Bar(name=f"{name}: error over Transformers' own", value=ratio, limit=MOST_OF_PEER)
            )
        elif entropy is not None:
            bars.append(Bar(name=f"{name}: entropy off", value=entropy, limit=MOST_NATS))
    return bars


def steps(folder: Path, found: Findings, bounded: Bounded, *, dry: bool) -> None:
    """`engine.py` with each engine by itself, so that one that fails leaves the other's numbers."""
    small = ["--size", "tiny", "--weights", "drawn", "--quick"] if dry else ["--size", "released"]
    engines = ("ours",) if dry else ("ours", "native")
    result: dict[str, Any] = {}
    failed = None
    for engine in engines:
        file = folder / f"{engine}.json"
        command = python("engine.py", *small, "--steps", "--engines", engine, "--json", str(file))
        try:
            found.notes += bounded.run(f"engine.py, {engine}", command).strip().splitlines()[:-1]
            result |= read(file)
        except StageError as error:
            failed = failed or error
    if dry:
        found.notes.append("native is left out: on a CPU host it runs on other kernels")
    found.values |= result
    found.bars += step_bars(result, why_not=NO_GPU if dry else "")
    if failed is not None:
        raise failed


def step_bars(result: Mapping[str, Any], *, why_not: str = "") -> list[Bar]:
    """The budgets of a step, and tokens per second over native's."""
    bars = []
    for canvases in CANVASES:
        at = f"at {canvases} canvas" + "es" * (canvases > 1)

        def cost(name: str, canvases: int = canvases) -> float | None:
            return result.get(f"ours.{canvases}.{name}")

        ours, native = (result.get(f"{e}.{canvases}.tokens_per_s") for e in ("ours", "native"))
        ratio = ours / native if ours and native else None
        bars += [
            Bar(name=f"waits a step {at}", value=cost("waits"), limit=MOST_WAITS, why_not=why_not),
            Bar(
                name=f"host launches a step {at}",
                value=cost("launches"),
                limit=MOST_LAUNCHES,
                why_not=why_not,
            ),
            Bar(
                name=f"kernels beside the forward {at}",
                value=cost("kernels"),
                limit=MOST_KERNELS[canvases],
                why_not=why_not,
            ),
            Bar(
                name=f"launches of the forward {at}",
                value=cost("forward_launches"),
                limit=1,
                why_not=why_not,
            ),
            Bar(
                name=f"tokens/s over native's {at}",
                value=ratio,
                limit=LEAST_OF_NATIVE,
                at_least=True,
                why_not=why_not,
            ),
        ]
    return bars


def head(found: Findings, bounded: Bounded, *, dry: bool) -> None:
    """`_device_head.py`, and the estimate of `head.py --roofline` beside it."""
    rows = (8, 32) if dry else HEAD_ROWS
    hidden, vocab = (128, 16384) if dry else (2816, 262144)
    command = python("_device_head.py", "--rows", *map(str, rows))
    said = bounded.run("the head", [*command, "--hidden", str(hidden), "--vocab", str(vocab)])
    measured = json.loads(said.strip().splitlines()[-1])
    for count, times in measured.items():
        ratio = times["head_ms"] / times["products_ms"]
        found.rows.append({"rows": int(count), **times, "of products": f"{ratio:.2f}x"})
        found.values |= {f"head.{count}.{name}": value for name, value in times.items()}
    found.bars += head_bars(measured, why_not=NO_GPU if dry else "")


def head_bars(measured: Mapping[str, Mapping[str, float]], *, why_not: str = "") -> list[Bar]:
    """The head over the two products, by rows."""
    return [
        Bar(
            name=f"head over its products at {rows} rows",
            value=times["head_ms"] / times["products_ms"],
            limit=MOST_OF_PRODUCTS,
            why_not=why_not,
        )
        for rows, times in measured.items()
    ]


def recipe(
    folder: Path, checkpoint: str | None, found: Findings, bounded: Bounded, *, dry: bool
) -> None:
    """`recipe.py`; in the dry form on a random checkpoint, its first part alone."""
    file, how = folder / "recipe.json", []
    if dry:
        from vllm_diffusion.testing.tiny_checkpoint import make_tiny_checkpoint

        checkpoint = str(make_tiny_checkpoint(folder / "tiny"))
        how = ["--quick", "--rounds", "1", "--phases", "recipe"]
        found.notes.append("the presets are left out: random weights say nothing of them")
    if checkpoint is None:
        raise StageError("name the CHECKPOINT to run it on")
    command = python("recipe.py", checkpoint, *how, "--json", str(file))
    found.notes += bounded.run("recipe.py", command).strip().splitlines()
    found.values |= (result := read(file))
    found.bars += recipe_bars(result, why_not=NO_GPU if dry else "")


def recipe_bars(result: Mapping[str, Any], *, why_not: str = "") -> list[Bar]:
    """Ours over what was published, and every arm of ours over native."""
    bars = []
    if (published := result.get("published")) is not None:
        bars.append(
            Bar(
                name="tokens/s of the recipe",
                value=result.get("recipe.ours.tokens_per_s"),
                limit=published,
                at_least=True,
                why_not=why_not,
            )
        )
    arms = [key.removesuffix(".of_native") for key in result if key.endswith(".of_native")]
    bars += [
        Bar(
            name=f"{arm.replace('.', ', ', 1)}: tokens/s over native's",
            value=result[f"{arm}.of_native"],
            limit=LEAST_OF_NATIVE,
            at_least=True,
            why_not=why_not,
        )
        for arm in arms
        if arm.split(".", 1)[1].startswith("ours")
    ]
    return bars


# ---- what is said ----


def read(file: Path) -> dict[str, Any]:
    """The results of a benchmark without their provenance, which this run has itself."""
    content = json.loads(file.read_text())
    return {k: v for k, v in content.items() if not k.startswith("provenance.") and k != "headline"}


def show(outcome: Outcome) -> None:
    """Print what a stage found."""
    for note in outcome.found.notes:
        print(f"  {note}")
    if outcome.found.rows:
        _report.print_table(outcome.found.rows)
    print(f"  ({outcome.seconds:.0f} s)", flush=True)


def sum_up(outcomes: Sequence[Outcome], options: argparse.Namespace) -> tuple[str, bool]:
    """Print the table of bars; the line behind it, and whether all is well."""
    bars = [bar for outcome in outcomes for bar in outcome.found.bars]
    said = {True: "held", False: "MISSED"}
    if bars:
        print()
        _report.print_table(
            [
                {
                    "bar": bar.name,
                    "here": bar.value,
                    "asked": bar.asked,
                    "": said[bar.held] if bar.held is not None else f"not judged: {bar.why_not}",
                }
                for bar in bars
            ]
        )
    line, fine = verdict(outcomes)
    return f"gpu-check{' (dry)' if options.dry else ''}: {line}", fine


def document(outcomes: Sequence[Outcome], line: str) -> dict[str, _report.Value]:
    """Everything, in flat keys."""
    flat: dict[str, _report.Value] = {f"provenance.{k}": v for k, v in _report.provenance().items()}
    for outcome in outcomes:
        flat[f"{outcome.stage}.seconds"] = round(outcome.seconds, 1)
        flat[f"{outcome.stage}.failure"] = outcome.failure
        flat |= {f"{outcome.stage}.{key}": value for key, value in outcome.found.values.items()}
        for bar in outcome.found.bars:
            flat |= {
                f"bars.{bar.name}.value": bar.value,
                f"bars.{bar.name}.limit": bar.limit,
                f"bars.{bar.name}.held": bar.held,
            }
    return flat | {"headline": line}


if __name__ == "__main__":
    sys.exit(main())
