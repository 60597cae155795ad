"""Savings and cost of look-ahead branches: several canvases per request, first to finish wins.

    python benchmarks/branches.py [--preset NAME ...] [--branches K ...] [--task NAME ...] [--n N]

Runs outside the engine, see `_loop`: the same items and seeds for every arm, hard sizes. `forwards`
and `rows` are per answer, with fused commits. Ratios and difference are relative to one branch of
the same preset; the difference is paired, in points of exact match, with its standard error.
`--engine` also runs the engine and counts answers that differ from those of one branch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import _report
from _cell import measure
from _loop import CHECKPOINT, CanvasLoop, items_of, seed_of

from vllm_diffusion.denoise.presets import preset_names
from vllm_diffusion.testing.tasks import TASKS, Item
from vllm_diffusion.tune.compare import paired, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _loop import Run


def main() -> None:
    """Answer with every arm and print them side by side."""
    parser = _report.parser(__doc__)
    parser.add_argument(
        "--preset", nargs="+", choices=preset_names(), default=["reference", "balanced"]
    )
    parser.add_argument("--branches", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--task", nargs="+", choices=TASKS)
    parser.add_argument("--n", type=int, default=200, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", action="store_true", help="compare one branch with the engine")
    parser.add_argument("--worker", type=Path, help="internal: the engine answers here")
    options = parser.parse_args()
    if options.worker:
        answer_here(options.worker, options.preset, options.seed)
        return
    items = items_of(5 if options.quick else options.n, options.seed, options.task)
    loop = CanvasLoop()
    results = {
        (preset, branches): [
            loop.answer(
                item, seed_of(options.seed, at), loop.rules.presets[preset], branches=branches
            )
            for at, item in enumerate(items)
        ]
        for preset in options.preset
        for branches in options.branches
    }
    flat: dict[str, _report.Value] = {"items": len(items)}
    if options.engine:
        theirs = engine_tokens(items, options.preset, options.seed)
        for preset, other in zip(options.preset, theirs, strict=True):
            own = [run.tokens for run in results[preset, options.branches[0]]]
            flat[f"{preset}.unlike engine"] = sum(a != b for a, b in zip(own, other, strict=True))
            print(
                f"{preset}: {flat[f'{preset}.unlike engine']} of {len(items)} unlike the engine's"
            )
    report(results, items, flat, options.json)


def report(
    results: dict[tuple[str, int], list[Run]],
    items: Sequence[Item],
    flat: dict[str, _report.Value],
    file: Path | None,
) -> None:
    """Print one row per task and arm, and one over all tasks."""
    rows = []
    tasks = list(dict.fromkeys(item.task for item in items))
    for task in [*tasks, "all"] if len(tasks) > 1 else tasks:
        chosen = [at for at, item in enumerate(items) if task in {item.task, "all"}]
        for (preset, branches), runs in results.items():
            first = next(runs for (name, _), runs in results.items() if name == preset)
            own, other = ([each[at] for at in chosen] for each in (runs, first))
            judged, base = (
                [run.judged(items[at]) for run, at in zip(each, chosen, strict=True)]
                for each in (own, other)
            )
            difference, error = paired(judged, base)
            forwards, granted = (sum(sum(run.steps) for run in each) for each in (own, other))
            ran, usual = (sum(run.rows for run in each) for each in (own, other))
            row = {
                "exact %": summarise(judged).score,
                "diff": ""
                if own is other or runs is first
                else f"{difference:+.1f} +- {error:.1f}",
                "forwards": forwards / len(own),
                "of one": forwards / granted,
                "rows": ran / len(own),
                "rows of one": ran / usual,
            }
            rows.append({"task": task, "preset": preset, "branches": branches, **row})
            flat.update({f"{preset}.{branches}.{task}.{name}": row[name] for name in row})
    _report.print_table(rows)
    over = rows[-1]["task"]
    saved = [
        f"{preset} {branches}: {flat[f'{preset}.{branches}.{over}.of one']:.2f} of the forwards, "
        f"{flat[f'{preset}.{branches}.{over}.rows of one']:.2f} of the rows"
        for preset, branches in results
    ]
    _report.finish(flat, "; ".join(saved), file)


def engine_tokens(
    items: Sequence[Item], presets: Sequence[str], seed: int
) -> list[list[list[int]]]:
    """Tokens of the engine's answers by preset, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "items.json"
        file.write_text(json.dumps([asdict(item) for item in items]))
        tokens: list[list[list[int]]] = measure(
            __file__,
            *("--worker", str(file), "--preset", *presets, "--seed", str(seed)),
            environment={
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_DIFFUSION": "1",
            },
            name="engine",
        )
    return tokens


def answer_here(file: Path, presets: Sequence[str], seed: int) -> None:
    """Let the engine answer the items of a file under presets; their tokens on the last line."""
    from _answers import ask_ours

    items = [Item(**item) for item in json.loads(file.read_text())]
    ways = [(None, {"diffusion_preset": preset}) for preset in presets]
    made = ask_ours(str(CHECKPOINT), items, seed, ways)
    print(json.dumps([[answer.tokens for answer in answers] for answers in made]))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
