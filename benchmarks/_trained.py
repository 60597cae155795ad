"""The presets beside native vLLM and Transformers, on a model that was trained and stops by itself.

`engine.py --trained` calls `compare`; this program is also the process in which one engine runs.
Every engine answers the same held-out items of hard sizes from chat messages to text, one by one
and eight at a time, end of the turn and decoding rule at work. Ours has the same seeds under every
arm, Transformers a seed a batch, native none. Of ours the arms take turns.

    tokens/s           tokens before the end of the turn, by the clock, median of the repeats
    tokens/cpu s       the same by processor seconds of the engine's process, which a host that is
                       busy with others disturbs less
    forwards           passes of a request's rows behind its prompt's, per request; in Transformers'
                       static batch a request runs as long as the batch
    rows               of these passes, commit rows that share a pass included, per request
    tokens/forward     as TPF_all of `quality.py`
    ours is            tokens/s of `balanced` over the arm's, and the same of processor seconds
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import _report
from _answers import NativeForwards, Transformers, generate, generate_ours, start_vllm, told
from _cell import measure
from _native_host import pretend_triton_has_a_cpu_backend, use_stand_ins

from vllm_diffusion.testing.tasks import TASKS, Item, held_out_items, solved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _answers import Answer

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
ASKED = ("json", "sudoku", "chain", "joint", "edit")
"""Without `count`, which the model has not learnt."""

CONCURRENCY = (1, 8)
COMPARED = "balanced"
ARMS: dict[str, dict[str, Any]] = {
    "reference, commits apart": {"diffusion_fused_commit": False},
    "reference": {"diffusion_preset": "reference"},
    "balanced": {"diffusion_preset": "balanced"},
    "fast": {"diffusion_preset": "fast"},
}
"""Of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One arm's answers to all items at one concurrency, once."""

    seconds: float
    processor_s: float
    tokens: int
    forwards: int
    rows: int
    exact: float
    """Percent."""


def items_of(count: int, seed: int) -> list[Item]:
    """The first items of every task, tasks in turn, so that a batch holds several."""
    asked = [list(held_out_items(task, count, seed=seed, sizes=TASKS[task].hard)) for task in ASKED]
    return [item for row in zip(*asked, strict=True) for item in row]


def compare(
    engines: Sequence[str],
    environment_of: Callable[[str], dict[str, str]],
    *,
    quick: bool,
    count: int,
    seed: int,
    file: Path | None,
) -> None:
    """Run every engine in a process of its own, print the table.

    Args:
        engines: names as `engine.py` has them.
        environment_of: of the process of an engine.
        quick: a run of a minute, which shows that the program works.
        count: items of every task.
        seed: of items and of noise.
        file: for the results as JSON.
    """
    arguments = ["--count", str(2 if quick else count), "--seed", str(seed)]
    arguments += ["--repeats", str(1 if quick else 3), *(["--eager"] if quick else [])]
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for engine in engines:
        results |= measure(
            __file__, engine, *arguments, environment=environment_of(engine), name=engine
        )
    report(
        {
            arm: {int(at): [Measured(**one) for one in runs] for at, runs in by.items()}
            for arm, by in results.items()
        },
        items=len(ASKED) * (2 if quick else count),
        file=file,
    )


def run_engine(engine: str, count: int, seed: int, repeats: int, *, eager: bool) -> None:
    """Answer with one engine and print the result as one line of JSON."""
    if engine == "native":
        pretend_triton_has_a_cpu_backend()
    items = items_of(count, seed)
    warm_up = items_of(2, seed + 1)
    arms = {
        "ours": ours,
        "native": native,
        "native-standin": native,
        "transformers": transformers,
    }[engine](engine, eager=eager)
    found: dict[str, dict[int, list[Any]]] = {name: {at: [] for at in CONCURRENCY} for name in arms}
    for ask in arms.values():
        for concurrency in CONCURRENCY:
            ask(warm_up, concurrency)
    for _ in range(repeats):
        for concurrency in CONCURRENCY:
            for name, ask in arms.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                answers = ask(items, concurrency)
                seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
                found[name][concurrency].append(asdict(judged(items, answers, seconds, cpu)))
    print(json.dumps(found))


def ours(_: str, *, eager: bool) -> dict[str, Any]:
    """The arms of ours, on one engine."""
    llm = start_vllm(str(CHECKPOINT), max(CONCURRENCY), eager=eager)

    def asking(options: dict[str, Any]) -> Callable[..., list[Answer]]:
        def ask(items: Sequence[Item], concurrency: int) -> list[Answer]:
            outputs = generate_ours(llm, items, 0, options, one_by_one=concurrency == 1)
            return [told(output) for output in outputs]

        return ask

    return {name: asking(options) for name, options in ARMS.items()}


def native(engine: str, *, eager: bool) -> dict[str, Any]:
    """VLLM's own DiffusionGemma, kernels interpreted or replaced."""
    if engine == "native-standin":
        use_stand_ins()
    llm = start_vllm(str(CHECKPOINT), max(CONCURRENCY), eager=eager)
    counter = NativeForwards(llm)

    def ask(items: Sequence[Item], concurrency: int) -> list[Answer]:
        outputs = generate(llm, items, [None] * len(items), {}, one_by_one=concurrency == 1)
        return [counter.told(output) for output in outputs]

    return {engine: ask}


def transformers(engine: str, **_: bool) -> dict[str, Any]:
    """Transformers, in static batches."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = Transformers(str(CHECKPOINT))

    def ask(items: Sequence[Item], concurrency: int) -> list[Answer]:
        batches = [items[at : at + concurrency] for at in range(0, len(items), concurrency)]
        return [
            answer for number, batch in enumerate(batches) for answer in model.answer(batch, number)
        ]

    return {engine: ask}


def judged(
    items: Sequence[Item], answers: Sequence[Answer], seconds: float, processor_s: float
) -> Measured:
    """What a run gave and took."""
    canvas = json.loads((CHECKPOINT / "config.json").read_text())["canvas_length"]
    # A commit beside the next canvas is no forward of its own, and has rows all the same.
    committed = [max(answer.commits, len(answer.steps) - 1) for answer in answers]
    denoised = [sum(answer.steps) for answer in answers]
    right = [
        answer.finished and solved(item, answer.text)
        for item, answer in zip(items, answers, strict=True)
    ]
    return Measured(
        seconds=seconds,
        processor_s=processor_s,
        tokens=sum(len(answer.tokens) for answer in answers),
        forwards=sum(denoised) + sum(answer.commits for answer in answers),
        rows=canvas * (sum(denoised) + sum(committed)),
        exact=100 * fmean(right),
    )


def report(results: dict[str, dict[int, list[Measured]]], *, items: int, file: Path | None) -> None:
    """Print one row per concurrency and arm, medians over the repeats."""
    rows = []
    flat: dict[str, _report.Value] = {"items": items}
    for concurrency in CONCURRENCY:
        figures = {arm: figures_of(by[concurrency], items) for arm, by in results.items()}
        ours = figures.get(COMPARED)
        for arm, own in figures.items():
            ratios = {
                f"{COMPARED} is": f"{ours['tokens/s'] / own['tokens/s']:.2f}x, "
                f"{ours['tokens/cpu s'] / own['tokens/cpu s']:.2f}x"
                if ours
                else None
            }
            rows.append({"at once": concurrency, "arm": arm, **own, **ratios})
            flat.update({f"{arm}.{concurrency}.{name}": value for name, value in own.items()})
    _report.print_table(rows)
    parts = []
    for concurrency in CONCURRENCY:
        apart, fused = (
            flat.get(f"{arm}.{concurrency}.tokens/s")
            for arm in ("reference, commits apart", COMPARED)
        )
        if isinstance(apart, float) and isinstance(fused, float):
            parts.append(f"{fused / apart:.2f}x at {concurrency}")
    _report.finish(flat, f"{COMPARED} over commits apart: {', '.join(parts)}", file)


def figures_of(runs: Sequence[Measured], items: int) -> dict[str, float]:
    """The columns of an arm; what does not vary between repeats is a mean over them."""
    tokens = sum(run.tokens for run in runs)
    return {
        "tokens/s": median(run.tokens / run.seconds for run in runs),
        "tokens/cpu s": median(run.tokens / run.processor_s for run in runs),
        "forwards": sum(run.forwards for run in runs) / len(runs) / items,
        "rows": sum(run.rows for run in runs) / len(runs) / items,
        "tokens/forward": tokens / sum(run.forwards for run in runs),
        "exact %": fmean(run.exact for run in runs),
    }


def main() -> None:
    """Run one engine here."""
    parser = argparse.ArgumentParser(description="internal: `engine.py --trained` calls it")
    parser.add_argument("engine")
    for name in ("--count", "--seed", "--repeats"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--eager", action="store_true", help="leave out the compiler")
    run_engine(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
