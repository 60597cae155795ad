"""Check on this host's GPU that the plugin is correct and meets its speed targets.

    scripts/gpu-check [CHECKPOINT] [--dry] [--json FILE] [--stages NAME ...]

    environment  a GPU is there, vLLM is one that was tested, the plugin is on
    tests        the tests that need a GPU
    parity       tokens and entropies against Transformers (`device_parity.py`)
    steps        waits, launches and kernels of a denoising step by torch's profiler, and tokens
                 per second, beside native vLLM at the released widths (`engine.py --steps`)
    head         the head beside its two products alone
    recipe       with CHECKPOINT: the published recipe, then the presets (`recipe.py`)

Without a checkpoint this takes at most ten minutes on one H100, H200 or RTX 5090 with a prepared
environment. Every stage has its own time limit, and a failing stage does not stop the others.
Prints a table per stage, a table of bars and one line naming missed bars; writes everything as JSON
with its provenance. The exit status is 1 if a bar is missed or a stage failed.

`--dry` runs the same commands with small sizes on a CPU host in a minute or two; bars that need a
GPU are listed and not judged.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import _report
from _bars import Outcome, Stage, run_stage, verdict
from _gpu_stages import environment, head, parity, recipe, steps, tests

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    parser.add_argument("checkpoint", nargs="?", help="the released checkpoint, a folder or a name")
    parser.add_argument("--dry", action="store_true", help="small sizes, on a CPU host")
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
        "head": ("how far is the head from its two products?", partial(head, folder, dry=dry)),
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


# ---- what is said ----


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
