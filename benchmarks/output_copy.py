"""Effect of a lower-precision copy of the head's matrix on statistics, answers and thresholds.

    python benchmarks/output_copy.py [--quick] [--json FILE] [--n N] [--seed N] [--hard]
        [--form FORM ...] [--rescored K ...] [--preset NAME ...]

The trained tiny checkpoint answers held-out items, the same seeds under every arm. An arm is a form
and how many of a row's best ids are scored exactly, see `vllm_diffusion/head/output_copy.py`. The
arm `exact` is the matrix itself. First every arm's head is given the rows of the exact one's
answers, noise and all, as the reference rule makes them:

    argmax, sample     rows in which the token is another one, in percent
    sure, torn, open   how far the entropy moves, in nats, mean magnitude and, behind it, the mean,
                       over rows of less than 0.1 nats, of up to 1 and of more
    accepts            canvases, of all steps, that accept other positions, in percent
    ends               canvases that are taken for certain or not, otherwise, in percent

Then every arm writes answers of its own, under every preset:

    same               answers that are those of the exact head, token by token, in percent
    diff               exact match beside the exact head's, in points, with its standard error

The model has 640 ids: 16 of them are a larger part of a row than of one over 262144. Without any
(`0`), the vocabulary's size hardly matters. benchmarks/head.py has the time and memory.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _report
import torch
from quality import judge

from vllm_diffusion.denoise.accept import entropy_bound
from vllm_diffusion.head.output_copy import HEAD_FORMS, RESCORED, QuantisedOutput
from vllm_diffusion.testing.tasks import TASKS, held_out_items
from vllm_diffusion.tune.compare import paired, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _answers import Answer
    from torch import Tensor

    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.stream import StreamingHead
    from vllm_diffusion.records import CanvasStats
    from vllm_diffusion.testing.tasks import Item
    from vllm_diffusion.tune.compare import Outcome

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
ASKED = ("json", "sudoku", "chain", "joint", "edit")
"""Without `count`, which the model has not learnt."""

EXACT = "exact"
CANVAS = 64
BOUND, CERTAIN = 0.1, 0.005
"""The reference rule's thresholds, in nats."""

BANDS = {"sure": (0.0, 0.1), "torn": (0.1, 1.0), "open": (1.0, float("inf"))}


@dataclass(slots=True)
class Shift:
    """What one arm's head says of rows, beside what the exact one says."""

    rows: int = 0
    canvases: int = 0
    other: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    moved: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0] * 3))

    def add(self, stats: CanvasStats, exact: CanvasStats) -> None:
        """Take in the statistics of whole canvases."""
        self.rows += len(exact.argmax)
        self.other["argmax"] += int((stats.argmax != exact.argmax).sum())
        self.other["sample"] += int((stats.sample != exact.sample).sum())
        shift = stats.entropy - exact.entropy
        for band, (low, high) in BANDS.items():
            here = shift[(exact.entropy >= low) & (exact.entropy < high)].double()
            for place, value in enumerate((here.abs().sum(), here.sum(), len(here))):
                self.moved[band][place] += float(value)
        own, right = (one.entropy.view(-1, CANVAS) for one in (stats, exact))
        self.canvases += len(own)
        self.other["accepts"] += int((accepted(own) != accepted(right)).any(dim=1).sum())
        certain = (own.mean(dim=1) < CERTAIN) != (right.mean(dim=1) < CERTAIN)
        self.other["ends"] += int(certain.sum())

    def columns(self) -> dict[str, _report.Value]:
        """The row of the table."""
        shares: dict[str, _report.Value] = {
            name: 100 * self.other[name] / self.rows for name in ("argmax", "sample")
        }
        for band, (size, total, count) in self.moved.items():
            shares[band] = f"{size / max(count, 1):.1e} ({total / max(count, 1):+.1e})"
        for name in ("accepts", "ends"):
            shares[name] = 100 * self.other[name] / self.canvases
        return shares


def accepted(entropy: Tensor) -> Tensor:
    """[B, L] what the reference rule accepts of whole canvases."""
    bound = entropy.new_full((len(entropy),), BOUND)
    return entropy_bound(entropy, bound, torch.ones_like(entropy, dtype=torch.bool))


class Compared:
    """The exact head, which asks the others about the same rows."""

    def __init__(self, exact: StreamingHead, others: dict[str, StreamingHead]) -> None:
        self._exact, self._others = exact, others
        self.shifts = {name: Shift() for name in others}

    def __call__(self, rows: Rows) -> CanvasStats:
        """See ``Head``."""
        exact = self._exact(rows)
        if len(rows) % CANVAS == 0:
            for name, head in self._others.items():
                self.shifts[name].add(head(rows), exact)
        return exact


def main() -> None:
    """Answer, compare, print two tables."""
    parser = _report.parser(__doc__)
    parser.add_argument("--n", type=int, default=60, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hard", action="store_true", help="items of hard sizes instead of easy ones"
    )
    parser.add_argument("--form", nargs="+", choices=HEAD_FORMS, default=list(HEAD_FORMS))
    parser.add_argument("--rescored", nargs="+", type=int, default=[0, 1, 4, RESCORED])
    parser.add_argument("--preset", nargs="+", default=["reference"])
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from _answers import sampler_of, start_vllm

    items = [
        item
        for task in ASKED
        for item in held_out_items(
            task,
            4 if options.quick else options.n,
            seed=options.seed,
            sizes=TASKS[task].hard if options.hard else TASKS[task].easy,
        )
    ]
    llm = start_vllm(str(CHECKPOINT))
    sampler = sampler_of(llm)
    exact = sampler.head
    arms = {
        f"{form}, {count}": replace(
            exact,
            vocabulary=replace(
                exact.vocabulary,
                copy=QuantisedOutput(exact.vocabulary.output, form, rescored=count),
            ),
        )
        for form in options.form
        for count in options.rescored
    }
    sampler.head = compared = Compared(exact, arms)
    answer(llm, items, options.seed, "reference")
    flat: dict[str, _report.Value] = {"items": len(items)}
    shifted = [{"head": name, **shift.columns()} for name, shift in compared.shifts.items()]
    print(f"{next(iter(compared.shifts.values())).rows} rows")
    _report.print_table(shifted)
    flat |= {f"{row['head']}.{key}": value for row in shifted for key, value in row.items()}
    print()

    table, told = [], []
    for preset in options.preset:
        results: dict[str, list[Answer]] = {}
        for name, head in {EXACT: exact, **arms}.items():
            sampler.head = head
            results[name] = answer(llm, items, options.seed, preset)
        baseline = judged(items, results[EXACT])
        for name, answers in results.items():
            own = judged(items, answers)
            difference, error = paired(own, baseline)
            pairs = zip(answers, results[EXACT], strict=True)
            same = 100 * sum(a.tokens == b.tokens for a, b in pairs) / len(items)
            figures = summarise(own)
            row: dict[str, _report.Value] = {
                "preset": preset,
                "head": name,
                "same": same,
                "exact %": figures.score,
                "diff": "" if name == EXACT else f"{difference:+.1f} +- {error:.1f}",
                "steps": figures.steps,
                "TPF_all": figures.tpf_all,
            }
            table.append(row)
            flat |= {f"{preset}.{name}.{key}": value for key, value in row.items()}
            if name.endswith(f" {RESCORED}") and preset == options.preset[0]:
                told.append(f"{name}: {same:.1f} % of the answers the same")
    _report.print_table(table)
    _report.finish(flat, "; ".join(told), options.json)


def answer(llm: Any, items: Sequence[Item], seed: int, preset: str) -> list[Answer]:  # noqa: ANN401 - LLM
    """All items under a preset."""
    from _answers import answer_of, generate_ours

    options = {"diffusion_preset": preset}
    return [answer_of(output) for output in generate_ours(llm, items, seed, options)]


def judged(items: Sequence[Item], answers: Sequence[Answer]) -> list[Outcome]:
    """Scores of answers."""
    return [judge(item, answer) for item, answer in zip(items, answers, strict=True)]


if __name__ == "__main__":
    main()
