"""Cost of a constraint in a denoising step: one canvas conditioned on an automaton, on a CPU.

    python benchmarks/posterior.py [--quick] [--json FILE] [--repeats N] [--automaton FILE ...]

    C++        `posterior.condition` as it runs where the C++ part is built
    torch      its definition, which runs elsewhere
    rows       `rows.constrained`, the statistics made of the posterior

The automata are random. Those called text are like one that reads a format: from every state most
classes stay, as inside a string, and a few lead on. Those called tangle are the worst: every edge
leads anywhere, so hardly any can be merged, and every state is met in every row. --automaton adds
pickled `TokenAutomaton`s. Milliseconds are those of the processor, median of the repeats; the
canvas begins in the first state, every row is constrained.
"""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import _report
import numpy as np
import torch

from vllm_diffusion.constrain.automaton import native
from vllm_diffusion.constrain.automaton.class_stats import ClassStats
from vllm_diffusion.constrain.automaton.edges import Edges
from vllm_diffusion.constrain.automaton.posterior import chain, condition
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.constrain.automaton.rows import constrained
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

CANVASES = (64, 256)
# kind, states, classes, classes that a state reads
CASES = (
    ("text", 10, 50, 30),
    ("text", 30, 100, 30),
    ("text", 100, 200, 100),
    ("text", 500, 1000, 200),
    ("text", 3000, 2000, 30),
    ("tangle", 100, 200, 100),
    ("tangle", 500, 1000, 200),
)
STAYS, LEADS = 0.9, 8  # share of a state's classes that stay, how many states on the others lead


def main() -> None:
    """Run every case and print it."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--repeats", type=int, default=9)
    arguments.add_argument("--automaton", type=Path, nargs="+", default=[])
    options = arguments.parse_args()
    assert native.library() is not None, "the C++ part is not built: scripts/setup"
    torch.set_num_threads(1)  # a canvas is one thread's work
    cases = [(kind, random_automaton(kind, *shape)) for kind, *shape in CASES]
    cases += [(file.stem, pickle.loads(file.read_bytes())) for file in options.automaton]
    if options.quick:
        cases = cases[:3]
    table, flat = [], {}
    for kind, automaton in cases:
        edges = Edges.of(automaton)
        assert edges.merged is not None
        shape = {
            "kind": kind,
            "N": automaton.num_states,
            "C": automaton.num_classes,
            "E": len(automaton.source),
            "pairs": len(edges.merged.pair_set),
            "sets": len(edges.merged.set_first) - 1,
        }
        for length in CANVASES:
            times = run_case(automaton, edges, length, options.repeats)
            table.append({**shape, "L": length, **times})
            name = f"{kind}.{automaton.num_states}.{length}"
            flat.update({f"{name}.{form}": value for form, value in times.items()})
    _report.print_table(table)
    _report.finish(flat, headline(table), options.json)


def run_case(
    automaton: TokenAutomaton, edges: Edges, length: int, repeats: int
) -> dict[str, _report.Value]:
    """Milliseconds by form."""
    stats, classes = random_rows(length, automaton.num_classes, len(automaton.class_of))
    asked = {
        "log_mass": classes.log_mass[None],
        "best_log_prob": classes.best_log_prob[None],
        "free": stats.top_prob.log()[None],
        "start": torch.tensor([automaton.start]),
        "rows": torch.tensor([length]),
        "left": torch.tensor([1_000_000]),
        "uniforms": torch.rand(1, length),
    }
    posterior = condition(edges=edges, **asked)
    assert posterior.log_z.isfinite().all()
    class_of = torch.from_numpy(automaton.class_of)
    plain = replace(edges, merged=None)
    return {
        "C++ ms": measure(lambda: condition(edges=edges, **asked), repeats),
        "torch ms": measure(lambda: chain(edges=plain, **asked), max(repeats // 4, 1)),
        "rows ms": measure(lambda: constrained(stats, classes, posterior, class_of), repeats),
    }


def measure(run: Callable[[], object], repeats: int) -> float:
    """Median of the processor's milliseconds, after one run that is not counted."""
    run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return 1e3 * median(taken)


def random_automaton(kind: str, states: int, classes: int, reads: int) -> TokenAutomaton:
    """Of random edges; the text may end anywhere, by the last class."""
    rng = np.random.default_rng(0)
    source, symbol, target = [], [], []
    for state in range(states):
        said = np.sort(rng.choice(np.arange(1, classes - 1), reads, replace=False))
        leads = rng.integers(0, states, reads)
        if kind == "text":
            on = np.minimum(state + rng.integers(1, LEADS, reads), states - 1)
            leads = np.where(rng.random(reads) < STAYS, state, on)
        source += [state] * (reads + 1)
        symbol += [*said.tolist(), classes - 1]
        target += [*leads.tolist(), states]
    return TokenAutomaton(
        class_of=rng.integers(0, classes, 4 * classes).astype(np.int32),
        num_classes=classes,
        source=np.array(source, np.int32),
        symbol=np.array(symbol, np.int32),
        target=np.array(target, np.int32),
        num_states=states + 1,
        start=0,
        accepting=np.ones(states + 1, bool),
        distance=np.zeros(states + 1, np.int32),
    )


def random_rows(length: int, num_classes: int, vocab: int) -> tuple[CanvasStats, ClassStats]:
    """Statistics such as a head gives; the class of the end tokens is unlikely."""
    draws = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(length, num_classes, generator=draws)

    logits = 3 * normal()
    logits[:, 0], logits[:, -1] = -torch.inf, -20.0
    log_mass = logits.log_softmax(dim=1)
    best = log_mass - normal().abs()
    ids = torch.randint(vocab, (length, num_classes), generator=draws)
    top = best.amax(dim=1).exp()
    stats = CanvasStats(
        argmax=ids[:, 1],
        sample=ids[:, 1],
        entropy=torch.rand(length, generator=draws) + 3.0,
        top_prob=top,
        margin=top / 2,
        soft_embedding=torch.zeros(length, 1),
    )
    return stats, ClassStats(
        log_mass=log_mass,
        entropy=normal().abs(),
        best=ids,
        best_log_prob=best,
        second_log_prob=best - normal().abs(),
        sample=ids,
    )


def headline(table: list[dict[str, _report.Value]]) -> str:
    """The longest step of each canvas."""
    longest = {
        length: max(row["C++ ms"] + row["rows ms"] for row in table if row["L"] == length)
        for length in CANVASES
    }
    return ", ".join(f"canvas {length}: at most {ms:.1f} ms" for length, ms in longest.items())


if __name__ == "__main__":
    main()
