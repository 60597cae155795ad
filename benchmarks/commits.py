"""Whether a commit forward could verify its canvas, and what partial commits would save.

    python benchmarks/commits.py [--preset NAME] [--task NAME ...] [--n N]
    python benchmarks/commits.py --async ...

Outside the engine, see `_loop`: hard sizes, the same items and seeds for every arm.

The first table asks whether a commit forward could verify the tokens it commits. Its rows are
causal, so the row before a token predicts it without having seen it. A token is right if the answer
has it at the same place; `joint` has several answers and is left out. Among right and wrong tokens,
the columns give the share that is not the row's best, and the share more than 3 nats behind the
best. A verifier is useful if these shares are far apart. `own row` is the same for the token's own
row, which has seen it. `soft` are tokens with a probability below 0.9 when their canvas ended.

The second table commits the settled part of an unfinished canvas after some steps: the leftmost
tokens that are unchanged since the last step and have a probability of 0.9, at least 16 of them.
`of whole` are forwards relative to the first row, which commits only whole canvases.

`--async` instead measures guesses that a canvas is about to end, if the rows of a forward are
granted while the previous one still runs, so that only the step before that is known. `last step`
is what the engine does: rows for two canvases if the canvas in flight is in the last step of its
schedule. The others also guess by mean entropy. `beside` is the share of commits followed by a
canvas that share a forward with it; the others take one of their own. `rows for nothing` are rows
granted for a commit that does not come, or after the last canvas of an answer, relative to all
rows. `forwards` are per canvas; `behind` is the same with every commit in a forward of its own, and
`apart` also counts a forward for the commit of an answer's last canvas.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import _report
import torch
from _loop import CanvasLoop, items_of, seed_of

from vllm_diffusion.denoise.presets import preset_names
from vllm_diffusion.testing.tasks import TASKS
from vllm_diffusion.tune.compare import paired, summarise

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from _loop import Commit, Run
    from torch import Tensor
    from transformers import AutoTokenizer

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.constants import EntropyBoundConstants
    from vllm_diffusion.records import CanvasStats
    from vllm_diffusion.testing.tasks import Item

FAR = 3.0  # nats behind the best token
SURE = 0.9  # probability
LEAST = 16  # tokens worth a commit
STEPS = (4, 8, 16)
GUESSES = {"last step": 0.0, "0.02 nats": 0.02, "0.1 nats": 0.1, "always": float("inf")}
FIXED = 16  # the recipe of published throughputs ends a canvas at so many steps and no other


def main() -> None:
    """Answer with every arm, print both tables."""
    parser = _report.parser(__doc__)
    parser.add_argument("--preset", choices=preset_names(), default="reference")
    parser.add_argument("--task", nargs="+", choices=TASKS)
    parser.add_argument("--n", type=int, default=100, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async", action="store_true", dest="asynchronous")
    options = parser.parse_args()
    items = items_of(5 if options.quick else options.n, options.seed, options.task)
    if options.asynchronous:
        guess(items, options)
        return
    loop = CanvasLoop()
    rule = loop.rules.presets[options.preset]
    flat: dict[str, _report.Value] = {"items": len(items)}

    commits: list[list[Commit]] = [[] for _ in items]
    whole = [
        loop.answer(item, seed_of(options.seed, at), rule, watch=commits[at].append)
        for at, item in enumerate(items)
    ]
    verified = verification(loop.tokenizer, items, commits)
    _report.print_table(verified)
    arms = {"whole": whole}
    for steps in STEPS:
        cut = partial(settled_part, steps)
        arms[f"a part after {steps}"] = [
            loop.answer(item, seed_of(options.seed, at), rule, cut=cut)
            for at, item in enumerate(items)
        ]
    print()
    parts = partial_commits(arms, items)
    _report.print_table(parts)
    for row in verified:
        flat.update({f"verify.{row['tokens']}.{name}": row[name] for name in row})
    for row in parts:
        flat.update({f"{row['commits']}.{row['task']}.{name}": row[name] for name in row})
    _report.finish(
        flat,
        f"commit rows expect another token at {verified[0]['not best %']:.1f} % of right and "
        f"{verified[1]['not best %']:.1f} % of wrong places",
        options.json,
    )


class EntropyLoop(CanvasLoop):
    """Also keeps the mean entropy of every step, in nats."""

    def __init__(self) -> None:
        super().__init__()
        self.nats: list[float] = []

    def _see(self, pool: object, batch: object, stats: CanvasStats, decision: object) -> None:
        super()._see(pool, batch, stats, decision)
        self.nats.append(float(stats.entropy.mean()))


def guess(items: Sequence[Item], options: argparse.Namespace) -> None:
    """Answer items under an adaptive and a fixed number of steps; print what guesses do."""
    loop, rows = EntropyLoop(), list[dict[str, _report.Value]]()
    adaptive = loop.rules.presets[options.preset]
    fixed = replace(adaptive, max_steps=FIXED, confidence_threshold=0.0, doubt_threshold=0.0)
    for name, rule in ((options.preset, adaptive), (f"{FIXED} steps", fixed)):
        answers = [
            recorded(loop, item, seed_of(options.seed, at), rule) for at, item in enumerate(items)
        ]
        rows += [
            {"rule": name, "guess": how, **guessed(answers, below, rule.max_steps)}
            for how, below in GUESSES.items()
        ]
    _report.print_table(rows)
    flat = {f"{row['rule']}.{row['guess']}.{name}": row[name] for row in rows for name in row}
    beside = " and ".join(f"{row['beside %']:.0f} %" for row in rows if row["guess"] == "last step")
    _report.finish(
        flat, f"{beside} of commits share a forward without a row for nothing", options.json
    )


def recorded(
    loop: EntropyLoop, item: Item, seed: int, rule: EntropyBoundConstants
) -> list[list[float]]:
    """The mean entropy of every step of every canvas of an answer."""
    loop.nats.clear()
    steps = iter(loop.nats)
    taken = loop.answer(item, seed, rule).steps
    return [[next(steps) for _ in range(count)] for count in taken]


def guessed(
    answers: Sequence[Sequence[Sequence[float]]], below: float, most: int
) -> dict[str, _report.Value]:
    """What guessing by an entropy, or by the last of so many steps, does to some answers."""
    canvases = [
        (nats, number < len(answer))
        for answer in answers
        for number, nats in enumerate(answer, start=1)
    ]
    steps = sum(len(nats) for nats, _ in canvases)
    followed = sum(goes_on for _, goes_on in canvases)
    beside = nothing = 0
    for nats, goes_on in canvases:
        for step in range(1, len(nats) + 1):  # which is in flight; the one before is known
            guess = step == most or (step > 1 and nats[step - 2] < below) or below == float("inf")
            hit = guess and goes_on and step == len(nats)
            # The engine knows by max_tokens, or sees, that none follows behind a last step.
            beside, nothing = beside + hit, nothing + (guess and not hit and step < most)
    rows = steps + followed + nothing
    return {
        "canvases": len(canvases),
        "followed": followed,
        "beside %": 100 * beside / followed,
        "rows for nothing %": 100 * nothing / rows,
        "forwards": (steps + followed - beside) / len(canvases),
        "behind": (steps + followed) / len(canvases),
        "apart": (steps + len(canvases)) / len(canvases),
    }


def verification(
    tokenizer: AutoTokenizer, items: Sequence[Item], commits: Sequence[Sequence[Commit]]
) -> list[dict[str, _report.Value]]:
    """What commit rows say of right and of wrong tokens, of all of them and of soft ones."""
    facts: dict[str, list[Tensor]] = {name: [] for name in ("right", "soft", "behind", "own")}
    for item, canvases in zip(items, commits, strict=True):
        if item.task == "joint" or not canvases:
            continue
        answer = torch.tensor(tokenizer.encode(item.answer, add_special_tokens=False))
        said = torch.cat([canvas.tokens for canvas in canvases])
        count = min(len(answer), len(said))
        facts["right"].append(said[:count] == answer[:count])
        soft = torch.cat([canvas.top_prob for canvas in canvases])[:count] < SURE
        facts["soft"].append(soft)
        for name in ("behind", "own"):
            logits = torch.cat([c.causal if name == "behind" else c.own for c in canvases])
            mine = logits.gather(1, said[:, None])[:, 0]
            facts[name].append((logits.max(dim=1).values - mine)[:count])
    all_of = {name: torch.cat(parts) for name, parts in facts.items()}
    rows: list[dict[str, _report.Value]] = []
    for kind, chosen in (("all", torch.ones_like(all_of["soft"])), ("soft", all_of["soft"])):
        for right in (True, False):
            here = chosen & (all_of["right"] == right)
            behind, own = all_of["behind"][here], all_of["own"][here]
            rows.append(
                {
                    "tokens": f"{kind}, {'right' if right else 'wrong'}",
                    "count": int(here.sum()),
                    "not best %": 100 * float((behind > 0).float().mean()),
                    "far behind %": 100 * float((behind > FAR).float().mean()),
                    "not best of own row %": 100 * float((own > 0).float().mean()),
                }
            )
    return rows


def settled_part(steps: int, pool: CanvasPool, before: Tensor, taken: int) -> int:
    """Tokens from the left on that are settled, after this many steps; 0 for too few."""
    if taken < steps:
        return 0
    settled = (pool.argmax == before) & (pool.top_prob >= SURE)
    count = int(settled[0].long().cumprod(0).sum())
    return count if LEAST <= count < pool.canvas_length else 0


def partial_commits(
    arms: dict[str, list[Run]], items: Sequence[Item]
) -> list[dict[str, _report.Value]]:
    """One row per task and arm, and one over all tasks."""
    rows: list[dict[str, _report.Value]] = []
    tasks = list(dict.fromkeys(item.task for item in items))
    whole = next(iter(arms.values()))
    for task in [*tasks, "all"] if len(tasks) > 1 else tasks:
        chosen = [at for at, item in enumerate(items) if task in {item.task, "all"}]
        first = [whole[at].judged(items[at]) for at in chosen]
        for name, runs in arms.items():
            judged = [runs[at].judged(items[at]) for at in chosen]
            difference, error = paired(judged, first)
            rows.append(
                {
                    "task": task,
                    "commits": name,
                    "exact %": summarise(judged).score,
                    "diff": "" if runs is whole else f"{difference:+.1f} +- {error:.1f}",
                    "finished %": summarise(judged).finished,
                    "forwards": sum(one.denoise for one in judged) / len(judged),
                    "of whole": sum(one.denoise for one in judged)
                    / sum(one.denoise for one in first),
                    "longest": max(step for one in judged for step in one.steps),
                }
            )
    return rows


if __name__ == "__main__":
    main()
