"""The families' greedy loops, dense: every step computes all items whole, without a cache.

Slow and plain on purpose: training is judged with them, and a served engine can be compared with
them. Both reveal blocks from left to right; they differ in who sees whom.
"""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from noising import Text


@dataclass(slots=True)
class Decoded:
    """What was written for an item."""

    tokens: list[int]
    """Up to the end of the turn, which is not among them."""
    finished: bool
    """Whether the turn was ended."""
    forwards: int


Reveal = Callable[[torch.Tensor, int], int]
"""How many of the open tokens are revealed, the surest first, given all their scores [n] and the
number of the step within the block. At least one and at most n are."""


def above(threshold: float) -> Reveal:
    """All that are surer than `threshold`."""
    return lambda scores, _: int((scores > threshold).sum())


def evenly(block: int, steps: int) -> Reveal:
    """A whole block in `steps`, of which the first take one more if that leaves a remainder."""
    return lambda _, step: block // steps + (step < block % steps)


@torch.no_grad()
def decode(
    family: str,
    model: Any,
    text: Text,
    prompts: Sequence[list[int]],
    lengths: Sequence[int],
    *,
    block: int,
    reveal: Reveal,
) -> list[Decoded]:
    """Greedy answers of at most these lengths to some prompts, all in one batch.

    Args:
        family: sdar, whose blocks stand on a grid from the beginning of the prompt and whose last
            block is whole, or llada, whose blocks begin behind the prompt.
        model: Transformers' model, which takes the mask of who sees whom.
        text: whose mask and end of the turn are meant.
        prompts: ids of every item.
        lengths: new tokens that it may take.
        block: tokens of a block.
        reveal: rule of a step. The score of a token is its probability; equal ones go by position.
    """
    grid = family == "sdar"
    begins = torch.tensor([[len(prompt)] for prompt in prompts])
    ends = begins + torch.tensor(lengths)[:, None]
    if grid:
        ends += -ends % block
    tokens = torch.full((len(prompts), int(ends.max())), text.mask)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    position = torch.arange(tokens.shape[1]).expand(tokens.shape)
    answer = (position >= begins) & (position < ends)
    blocks = torch.div(position - (0 if grid else begins), block, rounding_mode="floor")
    seen = blocks[:, None] <= blocks[..., None] if grid else (position < ends)[:, None]
    seen = seen.expand(-1, tokens.shape[1], -1)[:, None]

    forwards = [0] * len(prompts)
    steps: list[dict[int, int]] = [{} for _ in prompts]
    while True:
        open_ = answer & (tokens == text.mask)
        current = blocks.where(open_, tokens.shape[1]).amin(1, keepdim=True)
        # What is behind a block with the end of the turn is not begun.
        ended = (answer & (tokens == text.end) & (blocks < current)).any(1)
        rows = (open_.any(1) & ~ended).nonzero().flatten().tolist()
        if not rows:
            break
        logits = model(
            input_ids=tokens[rows], attention_mask=seen[rows], position_ids=position[rows]
        ).logits
        logits[..., text.mask] = -torch.inf
        scores, best = logits.float().softmax(-1).max(-1)
        for row, score, token in zip(rows, scores, best, strict=True):
            here = (open_[row] & (blocks[row] == current[row])).nonzero().flatten()
            step = steps[row].setdefault(int(current[row]), 0)
            count = min(max(reveal(score[here], step), 1), here.numel())
            chosen = here[score[here].argsort(descending=True, stable=True)[:count]]
            tokens[row, chosen] = token[chosen]
            steps[row][int(current[row])] += 1
            forwards[row] += 1
    written = [ids[own].tolist() for ids, own in zip(tokens, answer, strict=True)]
    return [
        Decoded(
            tokens=ids[: ids.index(text.end)] if text.end in ids else ids,
            finished=text.end in ids,
            forwards=count,
        )
        for ids, count in zip(written, forwards, strict=True)
    ]
