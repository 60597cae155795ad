"""Training rows of masked diffusion: items side by side, each with masks in its answer.

A row holds several items. Who sees whom follows from four numbers a token: item, block, view and
position. View 0 is what later blocks see.

    sdar    the clean item in view 0, block-causal, then its blocks from the first open one on in
            views of their own, each block masked at a level of its own: a block sees itself and the
            clean blocks before it
    llada   prompt and answer in one block that sees all of itself; the answer is masked at one
            level, and filled up with the end of the turn to one of a few lengths
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from vllm_diffusion.testing import tasks

ROW = 384
"""Tokens of a row."""

IGNORED = -100
"""Target of a token that is not judged, as in torch's cross-entropy."""

BLOCK = 8
"""Tokens of a block of sdar, on a grid from the beginning of the prompt."""

VIEWS = 2
"""Masked copies of an item of sdar: the clean one is computed once for both."""

REGIONS = (16, 32, 64)
"""Lengths of an answer of llada; those that hold it and its end are drawn alike."""

LEAST = 0.1
"""Level of masking from which on a token weighs one over it."""

SHORT_OFTEN = frozenset({"chain"})
"""Tasks of which small sizes are drawn more often: their rules are the same at every length."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of packed rows; every field is [rows, ROW], int64 but for `weight`."""

    tokens: torch.Tensor
    """Input ids, masks among them."""
    targets: torch.Tensor
    """Clean ids under masks, IGNORED elsewhere."""
    weight: torch.Tensor
    """Of a judged token's loss, fp32: one over the level at which its block was masked."""
    item: torch.Tensor
    """Number of the item within the batch; -1 is padding."""
    block: torch.Tensor
    """Number of the block within the item."""
    view: torch.Tensor
    """0 for what later blocks see, else the number of a masked copy."""
    position: torch.Tensor
    """Absolute position within the item."""
    answers: int
    """Tokens of answers, masked or not, in all rows: what the loss is a mean over."""

    def visibility(self) -> torch.Tensor:
        """Who sees whom, [rows, 1, ROW, ROW] bool."""
        query = (slice(None), slice(None), None)
        key = (slice(None), None, slice(None))
        before = (self.view[key] == 0) & (self.block[key] < self.block[query])
        itself = (self.view[key] == self.view[query]) & (self.block[key] == self.block[query])
        return ((self.item[key] == self.item[query]) & (before | itself))[:, None]


@dataclass(slots=True)
class Columns:
    """One item in a row."""

    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    view: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)

    def add(self, token: int, *, block: int, view: int, position: int) -> None:
        """A token that is shown."""
        self.tokens.append(token)
        self.targets.append(IGNORED)
        self.weight.append(0.0)
        self.block.append(block)
        self.view.append(view)
        self.position.append(position)

    def hide(self, mask: int, level: float) -> None:
        """Put a mask in the place of the last token."""
        self.targets[-1] = self.tokens[-1]
        self.tokens[-1] = mask
        self.weight[-1] = 1 / max(level, LEAST)


@dataclass(frozen=True, slots=True)
class Text:
    """The tokenizer and its ids that training needs."""

    tokenizer: Tokenizer
    mask: int
    end: int

    def ids(self, item: tasks.Item) -> tuple[list[int], list[int]]:
        """Prompt under the chat template, and answer with the end of the turn."""
        prompt = f"<bos><|turn>user\n{item.prompt}<turn|>\n<|turn>model\n"
        return self.encode(prompt), [*self.encode(item.answer), self.end]

    def encode(self, text: str) -> list[int]:
        """Ids of a text as it stands."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


def training_items(
    rng: random.Random, shares: Mapping[str, float], sizes: Mapping[str, Sequence[int]]
) -> Iterator[tasks.Item]:
    """Endless items that are not held out, of tasks in these shares and of these sizes."""
    while True:
        (task,) = rng.choices(list(shares), shares.values())
        share = rng.random() ** (2 if task in SHORT_OFTEN else 1)
        item = tasks.make_item(task, rng, sizes[task][int(share * len(sizes[task]))])
        if not item.held_out:
            yield item


def pack(
    family: str, text: Text, items: Iterator[tasks.Item], rng: random.Random, *, rows: int
) -> Rows:
    """Fill `rows` rows with what `items` gives; `rng` draws the masks."""
    shape = rows, ROW
    packed = {
        "tokens": torch.zeros(shape, dtype=torch.int64),
        "targets": torch.full(shape, IGNORED),
        "weight": torch.zeros(shape),
        "block": torch.zeros(shape, dtype=torch.int64),
        "view": torch.zeros(shape, dtype=torch.int64),
        "position": torch.zeros(shape, dtype=torch.int64),
    }
    item = torch.full(shape, -1)
    used = [0] * rows
    misfits = answers = 0
    for number, drawn in enumerate(items):
        prompt, answer = text.ids(drawn)
        columns, judged = LAYOUTS[family](text, prompt, answer, rng)
        length = len(columns.tokens)
        fitting = [row for row in range(rows) if used[row] + length <= ROW]
        if not fitting:
            misfits += 1
            if misfits == 2 * rows:  # by now the gaps are small
                break
            continue
        row = max(fitting, key=used.__getitem__)  # the tightest
        place = slice(used[row], used[row] + length)
        for name, values in packed.items():
            values[row, place] = torch.tensor(getattr(columns, name), dtype=values.dtype)
        item[row, place] = number
        used[row] += length
        answers += judged
    return Rows(**packed, item=item, answers=answers)


def lay_out_sdar(
    text: Text, prompt: list[int], answer: list[int], rng: random.Random
) -> tuple[Columns, int]:
    """An item and its masked copies, and how many of their tokens are of the answer.

    The rest of the last block is the end of the turn again.
    """
    tokens = prompt + answer
    tokens += [text.end] * (-len(tokens) % BLOCK)
    first = len(prompt) // BLOCK * BLOCK
    columns = Columns()
    # Nothing sees the last clean block but itself.
    for position, token in enumerate(tokens[:-BLOCK]):
        columns.add(token, block=position // BLOCK, view=0, position=position)
    for view in range(1, VIEWS + 1):
        level = 0.0
        for position, token in enumerate(tokens[first:], start=first):
            if position % BLOCK == 0:
                level = rng.random()
            columns.add(token, block=position // BLOCK, view=view, position=position)
            if position >= len(prompt) and rng.random() < level:
                columns.hide(text.mask, level)
    return columns, VIEWS * (len(tokens) - len(prompt))


def lay_out_llada(
    text: Text, prompt: list[int], answer: list[int], rng: random.Random
) -> tuple[Columns, int]:
    """An item whose answer is filled up to a length with the end of the turn, and that length."""
    region = rng.choice([length for length in REGIONS if length >= len(answer)])
    tokens = prompt + answer + [text.end] * (region - len(answer))
    level = rng.random()
    columns = Columns()
    for position, token in enumerate(tokens):
        columns.add(token, block=0, view=0, position=position)
        if position >= len(prompt) and rng.random() < level:
            columns.hide(text.mask, level)
    return columns, region


LAYOUTS = {"sdar": lay_out_sdar, "llada": lay_out_llada}
