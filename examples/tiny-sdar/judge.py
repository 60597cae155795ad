"""Exact match of a checkpoint under its family's dense loop: `python judge.py DIR [--n N]`.

Prints one line per task of the held-out items of easy sizes that are answered exactly, and what a
forward gave. SDAR reveals what is surer than 0.85, at least one token a step, or with `--steps` an
even split of a block; LLaDA splits the masks of a block of 32 evenly over 16 steps, or `--steps`.
"""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decoding import Decoded, above, decode, evenly
from noising import BLOCK, REGIONS, Text
from released import build_text, load_model

from vllm_diffusion.testing import tasks

SPARE = BLOCK
"""Tokens that an answer of sdar may be too long by before it is cut."""

LLADA_BLOCK, LLADA_STEPS = 32, 16

THRESHOLD = 0.85
"""SDAR's published one."""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--n", type=int, default=100, help="items of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="forwards of a block, evenly")
    parser.add_argument("--sizes", choices=("easy", "hard"), default="easy")
    options = parser.parse_args()
    family = json.loads((options.checkpoint / "config.json").read_text())["model_type"]
    model, text = load_model(family, options.checkpoint), build_text()
    for name, task in tasks.TASKS.items():
        sizes = getattr(task, options.sizes)
        items = list(tasks.held_out_items(name, options.n, seed=options.seed, sizes=sizes))
        written = answer(family, model, text, items, options.steps)
        share = exact(items, written, text)
        tokens = sum(len(each.tokens) for each in written)
        forwards = sum(each.forwards for each in written)
        print(f"{name:8} {share:5.1f} %  {tokens / forwards:5.2f} tokens a forward")


def answer(
    family: str, model: Any, text: Text, items: Sequence[tasks.Item], steps: int | None = None
) -> list[Decoded]:
    """Answers to items under the family's usual rule, or one of `steps` a block."""
    prompts, answers = zip(*(text.ids(item) for item in items), strict=True)
    if family == "sdar":
        block, lengths = BLOCK, [len(ids) + SPARE for ids in answers]
        reveal = evenly(block, steps) if steps else above(THRESHOLD)
    else:
        block, lengths = LLADA_BLOCK, [region_of(len(ids)) for ids in answers]
        reveal = evenly(block, steps or LLADA_STEPS)
    return decode(family, model, text, prompts, lengths, block=block, reveal=reveal)


def region_of(count: int) -> int:
    """Length of an answer of llada that holds `count` tokens, in whole blocks."""
    fitting = [n for n in REGIONS if n % LLADA_BLOCK == 0 and n >= count]
    return fitting[0] if fitting else -(-count // LLADA_BLOCK) * LLADA_BLOCK


def exact(items: Sequence[tasks.Item], written: Sequence[Decoded], text: Text) -> float:
    """Share of the items that were answered exactly, in percent."""
    right = [
        each.finished and tasks.solved(item, text.tokenizer.decode(each.tokens))
        for item, each in zip(items, written, strict=True)
    ]
    return 100 * sum(right) / len(right)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
