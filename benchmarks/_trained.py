"""The presets beside native vLLM and Transformers, on a trained model that ends its turns itself.

`engine.py --trained` calls `compare`; this program is also the process in which one engine runs.
Every engine answers the same held-out items of hard sizes from chat messages to text, one by one
and eight at a time, end of the turn and decoding rule at work. Ours has the same seeds under every
arm, Transformers a seed a batch, native none. All engines are started, then they take turns, one
working and the others waiting, so that a host that is busy at times disturbs all of them.

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
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Self

import _report
from _answers import NativeForwards, Transformers, answer_of, generate, generate_ours, start_vllm
from _native_host import has_gpu, pretend_triton_has_a_cpu_backend, use_stand_ins

from vllm_diffusion.testing.tasks import TASKS, Item, held_out_items, solved

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _answers import Answer

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
ASKED = ("json", "sudoku", "chain", "joint", "edit")
"""Without `count`, which the model has not learnt."""

CONCURRENCY = (1, 8)
REPEATS = 3
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
        seed: of the items.
        file: for the results as JSON.
    """
    count = 2 if quick else count
    arguments = ["--count", str(count), "--seed", str(seed), *(["--eager"] if quick else [])]
    results: dict[str, dict[int, list[Measured]]] = {}
    with ExitStack() as running:
        workers = [
            running.enter_context(Worker(engine, arguments, environment_of(engine)))
            for engine in engines
        ]
        for _ in range(1 if quick else REPEATS):
            for concurrency, worker in product(CONCURRENCY, workers):
                for arm, measured in worker.ask(concurrency).items():
                    by = results.setdefault(arm, {at: [] for at in CONCURRENCY})
                    by[concurrency].append(Measured(**measured))
    report(results, items=len(ASKED) * count, file=file)


class Worker:
    """An engine in a process of its own, which works when it is asked."""

    def __init__(
        self,
        engine: str,
        arguments: list[str],
        environment: dict[str, str],
        program: str = __file__,
    ) -> None:
        self._engine = engine
        self._process = subprocess.Popen(
            [sys.executable, program, engine, *arguments],
            env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        self._read()  # it is started and warm
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # the end of its input ends it

    def ask(self, concurrency: int) -> dict[str, dict[str, Any]]:
        """One round of all its arms."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{concurrency}\n")
        self._process.stdin.flush()
        found: dict[str, dict[str, Any]] = self._read()
        return found

    def _read(self) -> Any:  # noqa: ANN401 - JSON
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit(f"{self._engine} failed with status {self._process.wait()}")
        return json.loads(line)


def run_engine(engine: str, count: int, seed: int, *, eager: bool) -> None:
    """Answer with one engine as often as a line of the input asks for it, a line of JSON each."""
    # What the engine's libraries print is not among the results.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if engine == "native" and not has_gpu():
        pretend_triton_has_a_cpu_backend()
    items = items_of(count, seed)
    warm_up = items_of(2, seed + 1)
    arms = {
        "ours": ours,
        "native": native,
        "native-standin": native,
        "transformers": transformers,
    }[engine](engine, eager=eager)
    for ask in arms.values():
        for concurrency in CONCURRENCY:
            ask(warm_up, concurrency)
    print(json.dumps("ready"), file=results)
    for line in sys.stdin:
        found = {}
        for name, ask in arms.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            answers = ask(items, int(line))
            seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            found[name] = asdict(judged(items, answers, seconds, cpu))
        print(json.dumps(found), file=results)


def ours(_: str, *, eager: bool) -> dict[str, Any]:
    """The arms of ours, on one engine."""
    llm = start_vllm(str(CHECKPOINT), max(CONCURRENCY), eager=eager)

    def asking(options: dict[str, Any]) -> Callable[..., list[Answer]]:
        def ask(items: Sequence[Item], concurrency: int) -> list[Answer]:
            outputs = generate_ours(llm, items, 0, options, one_by_one=concurrency == 1)
            return [answer_of(output) for output in outputs]

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
        return [counter.answer_of(output) for output in outputs]

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
    for name in ("--count", "--seed"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--eager", action="store_true", help="leave out the compiler")
    run_engine(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
