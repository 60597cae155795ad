"""The stages of `gpu_check.py`: each runs a program and sets thresholds for its results.

A stage fills in `Findings`; its bars are a function of the results only.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report
from _bars import Bar, Bounded, Findings, StageError

if TYPE_CHECKING:
    from collections.abc import Mapping

HERE = Path(__file__).parent
ROOT = HERE.parent
CANVASES = (1, 4, 16)
CANVAS = 256
HEAD_ROWS = tuple(CANVAS * canvases for canvases in CANVASES)
NO_GPU = "needs a GPU"

MOST_WAITS, MOST_LAUNCHES = 0, 60
MOST_KERNELS = {1: 150, 4: 200, 16: 200}
"""By canvases. `tests/gpu_dry/test_budgets.py` holds a pretended GPU to the same three."""
MOST_OF_PRODUCTS = 1.25
LEAST_OF_NATIVE = 1.0
MOST_NATS = 1e-4
"""Between two engines in fp32; rounding leaves 1e-5."""
MOST_OF_PEER = 2.0
"""What ours may be off in bf16, of what Transformers is off itself."""

GPU_TESTS = ("tests/ops", "tests/unit", "tests/engine")


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


def head(folder: Path, found: Findings, bounded: Bounded, *, dry: bool) -> None:
    """`_device_head.py`, and the estimate of `head.py --roofline` beside it."""
    rows = (8, 32) if dry else HEAD_ROWS
    hidden, vocab = (128, 16384) if dry else (2816, 262144)
    file = folder / "roofline.json"
    bounded.run("head.py --roofline", python("head.py", "--roofline", "--json", str(file)))
    estimates = estimate_of(str(_report.gpu().get("gpu.name", "")), read(file))
    command = python("_device_head.py", "--rows", *map(str, rows))
    said = bounded.run("the head", [*command, "--hidden", str(hidden), "--vocab", str(vocab)])
    measured = json.loads(said.strip().splitlines()[-1])
    for count, times in measured.items():
        beside = estimates.get(int(count), {})
        found.rows.append(
            {
                "rows": int(count),
                **times,
                "over products": f"{times['head_ms'] / times['products_ms']:.2f}",
                "estimate": beside.get("head ms"),
                "over the products' estimate": beside.get("ratio"),
            }
        )
        found.values |= {f"{count}.{name}": value for name, value in times.items()}
        found.values |= {f"{count}.estimate.{name}": value for name, value in beside.items()}
    if dry:
        found.notes.append(f"estimates are of other rows: {', '.join(map(str, HEAD_ROWS))}")
    found.bars += head_bars(measured, why_not=NO_GPU if dry else "")


def estimate_of(gpu: str, roofline: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """By rows, what `head.py --roofline` says of the plain head on a GPU, if it knows it."""
    found: dict[int, dict[str, float]] = {}
    for key, value in roofline.items():
        parts = key.split(".", 3)
        if len(parts) == 4 and parts[0] == "bf16" and parts[1] in gpu and parts[2].isdigit():
            found.setdefault(CANVAS * int(parts[2]), {})[parts[3]] = value
    return found


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
        from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import make_tiny_checkpoint

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
    # The recipe's bar is there even if ours was not, which keeps no bar.
    keys = dict.fromkeys(["recipe.ours.of_native", *result])
    arms = [key.removesuffix(".of_native") for key in keys if key.endswith(".of_native")]
    bars += [
        Bar(
            name=f"{arm.replace('.', ', ', 1)}: tokens/s over native's",
            value=result.get(f"{arm}.of_native"),
            limit=LEAST_OF_NATIVE,
            at_least=True,
            why_not=why_not,
        )
        for arm in arms
        if arm.split(".", 1)[1].startswith("ours")
    ]
    return bars


def read(file: Path) -> dict[str, Any]:
    """The results of a benchmark without their provenance, which this run has itself."""
    content = json.loads(file.read_text())
    return {k: v for k, v in content.items() if not k.startswith("provenance.") and k != "headline"}
