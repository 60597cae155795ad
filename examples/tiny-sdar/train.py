"""Train the tiny SDAR or LLaDA: `python train.py --family sdar|llada --out DIR [--steps N]`.

Masked diffusion: tokens of an answer are replaced by the mask at a level from U(0, 1), and the
cross-entropy of a masked one is weighted by one over that level. `noising.py` has what the families
see. A run that was cut goes on where it stopped; batches depend on seed and step alone.
"""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

import argparse
import csv
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from inherit import inherit
from noising import BLOCK, IGNORED, LAYOUTS, ROW, Rows, Text, pack, training_items
from released import build_model, build_text, load_model, save_checkpoint
from torch import nn

from vllm_diffusion.testing import tasks
from vllm_diffusion.testing.families import part_of

SHARES = {"json": 4, "edit": 3, "joint": 1, "chain": 4, "sudoku": 3}
"""How often each task is drawn, all in their easy sizes."""

WARM_UP = 100
"""Steps until the full learning rate."""

COOL_DOWN = 0.3
"""Last share of the steps, over which it falls to zero."""

LOGGED_EVERY = 50
SAVED_EVERY = 100
JUDGED_EVERY = 500
JUDGED = 8
"""Held-out items of each task whose answers are judged: it takes as long as some thirty steps."""

RULES: dict[str, dict[str, Any]] = {
    "sdar": {"block": BLOCK},
    "llada": {"block": 32, "max_steps": 16},
}
"""With what the dense loops of the families' definitions answer them."""


def main() -> None:
    """Train, and write checkpoint, log and state into the folder that was asked for."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    text = build_text()
    model = build_model(options.family, text, options.seed)
    if options.begin:
        sdar = load_model("sdar", options.begin)
        inherit(model, sdar, batch("sdar", text, str(options.seed), options.rows))
    train(model, text, options)
    save_checkpoint(options.family, model, text, options.out)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the tiny SDAR or LLaDA.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--family", choices=LAYOUTS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log.csv and state.pt")
    parser.add_argument("--begin", type=Path, help="of llada: a trained sdar whose weights it gets")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=8, help=f"batch, in rows of {ROW} tokens")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of both optimisers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def train(model: Any, text: Text, options: argparse.Namespace) -> None:
    """Optimise `model` in place."""
    optimisers = build_optimisers(model, options.rate)
    begun = resume(options.out / "state.pt", model, optimisers)
    forward = torch.compile(model, dynamic=False)
    smooth, clock = 0.0, time.monotonic()
    for step in range(begun, options.steps):
        rate = options.rate * scheduled(step, options.steps)
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = rate
        loss = train_step(forward, text, step, options)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        smooth = loss if step == begun else 0.98 * smooth + 0.02 * loss
        done = step + 1
        ended = done == options.steps
        if done % SAVED_EVERY == 0 or ended:
            save(options.out / "state.pt", done, model, optimisers)
        if done % LOGGED_EVERY == 0 or ended:
            row = {"step": done, "loss": f"{smooth:.4f}", "rate": f"{rate:.2e}"}
            row["seconds"] = f"{time.monotonic() - clock:.1f}"
            judged = done % JUDGED_EVERY == 0 or ended
            exact = exact_match(options.family, model, text) if judged else {}
            log(options.out / "log.csv", row, exact)
            clock = time.monotonic()


def scheduled(step: int, steps: int) -> float:
    """Share of the learning rate at `step` of `steps`."""
    return min(1.0, (step + 1) / WARM_UP, (steps - step) / (COOL_DOWN * steps))


def train_step(forward: Any, text: Text, step: int, options: argparse.Namespace) -> float:
    """Add the gradients of one batch, and return its loss in nats a token of an answer."""
    rows = batch(options.family, text, f"{options.seed}:{step}", options.rows)
    loss = judge(forward, rows)
    loss.backward()
    return loss.item()


def batch(family: str, text: Text, seed: str, rows: int) -> Rows:
    """Rows that depend on the seed alone."""
    rng = random.Random(seed)  # noqa: S311 -- reproducible, not secret
    sizes = {name: tasks.TASKS[name].easy for name in SHARES}
    return pack(family, text, training_items(rng, SHARES, sizes), rng, rows=rows)


def judge(forward: Any, rows: Rows) -> torch.Tensor:
    """Bound on the answers' negative log-likelihood, in nats a token."""
    with torch.autocast("cpu", torch.bfloat16):
        output = forward(
            input_ids=rows.tokens,
            attention_mask=rows.visibility(),
            position_ids=rows.position,
            use_cache=False,
        )
    judged = rows.targets != IGNORED
    losses = F.cross_entropy(output.logits[judged].float(), rows.targets[judged], reduction="none")
    return (losses * rows.weight[judged]).sum() / rows.answers


def build_optimisers(model: Any, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between hidden states, AdamW for embedding, head and norms."""
    apart = ("embed", "lm_head", "norm")
    weights = dict(model.named_parameters())
    matrices = {n: p for n, p in weights.items() if not any(word in n for word in apart)}
    others = {n: p for n, p in weights.items() if n not in matrices}
    return [
        torch.optim.Muon(
            matrices.values(), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others.values(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        ),
    ]


def exact_match(family: str, model: Any, text: Text) -> dict[str, float]:
    """Share of a few held-out items that are answered exactly, by task, in percent."""
    answer, block = part_of(family, "reference").answer, RULES[family]["block"]
    made = {}
    for name in SHARES:
        items = list(tasks.held_out_items(name, JUDGED, seed=0, sizes=tasks.TASKS[name].easy))
        right = 0
        for item in items:
            prompt, expected = text.ids(item)
            length = -(-len(expected) // block) * block
            written = answer(
                model, prompt, length, mask_id=text.mask, ends=(text.end,), **RULES[family]
            ).tokens
            ended = written[-1] == text.end
            right += ended and tasks.solved(item, text.tokenizer.decode(written))
        made[name] = 100 * right / JUDGED
    return made


def resume(path: Path, model: Any, optimisers: list[torch.optim.Optimizer]) -> int:
    """Load what `save` wrote, if anything, and return the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["weights"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return int(state["step"])


def save(path: Path, step: int, model: Any, optimisers: list[torch.optim.Optimizer]) -> None:
    """Write everything that a later process needs; a cut while writing leaves the old state."""
    state = {
        "step": step,
        "weights": model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers],
    }
    unfinished = path.with_suffix(".tmp")
    torch.save(state, unfinished)
    unfinished.replace(path)


def log(path: Path, row: dict[str, Any], exact: dict[str, float]) -> None:
    """Append one line; exact match stands where it was measured."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*row, *SHARES])
        if new:
            writer.writeheader()
        writer.writerow(row | {name: f"{share:.0f}" for name, share in exact.items()})


if __name__ == "__main__":
    main()
