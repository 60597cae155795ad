"""Training rows: several questions side by side, each seen under its own noise.

One item becomes its clean tokens (prompt and committed canvases, causal) followed by two noised
views of its canvases, which see the clean tokens before them and themselves. Everything about
visibility follows from four numbers a token: item, position, view, and where the view begins.

Some views are templates: words of the answer are holes a few tokens too long, filled up with
padding, and the text around them stays clean.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import (
    BOS,
    PAD,
    TURN_END,
    TURN_START,
    token_id,
)
from vllm_diffusion.testing import tasks

VIEWS = 2
"""Noised canvases per item: of different canvases where it has several, else of the same one."""

SHARES = {
    0: {"json": 6, "sudoku": 4, "chain": 8, "count": 4, "edit": 4, "joint": 2},
    4000: {"json": 4, "sudoku": 3, "chain": 10, "count": 6, "edit": 2, "joint": 1},
    7000: {"json": 3, "sudoku": 5, "chain": 12, "count": 5, "edit": 2, "joint": 2},
}
"""How often each task is drawn, from a step on: copying is learnt first, sums last."""

SHORT_OFTEN = frozenset({"chain", "count"})
"""Tasks of which small sizes are drawn more often: their rules are the same at every length."""

TEMPLATES = 0.2
"""Share of items of which a view is a template."""

MOST_HOLES, MOST_SLACK = 3, 4
"""Holes of a template, and padding at the end of a hole, at most."""

ROW = 416
"""Tokens of a row; the longest item is some ten tokens shorter."""

IGNORED = -100
"""Target of a token that is not judged, as in torch's cross-entropy."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of packed rows; every field is [rows, ROW] and int64."""

    tokens: torch.Tensor
    """Input ids; those of views are already noised."""
    targets: torch.Tensor
    """Clean ids under views, IGNORED elsewhere and where a template's text is given."""
    item: torch.Tensor
    """Number of the item within its row; -1 is padding."""
    position: torch.Tensor
    """Absolute position within the item."""
    view: torch.Tensor
    """0 for clean tokens, else the number of the view."""
    start: torch.Tensor
    """Position at which a view begins; of no meaning for clean tokens."""

    def visibility(self, window: int | None = None) -> torch.Tensor:
        """Who sees whom, [rows, 1, ROW, ROW] bool, with the sliding window of a layer or without.

        A clean token sees clean ones up to itself, a view the clean ones before it and itself. With
        a window W that is the last W clean positions, and the last W - 1 before the view.
        """
        query = (slice(None), slice(None), None)
        key = (slice(None), None, slice(None))
        clean = self.view == 0
        last = torch.where(clean, self.position, self.start - 1)
        before = clean[key] & (self.position[key] <= last[query])
        if window is not None:
            first = torch.where(clean, self.position, self.start) - window
            before &= self.position[key] > first[query]
        itself = (self.view[query] == self.view[key]) & ~clean[query]
        return ((self.item[query] == self.item[key]) & (before | itself))[:, None]


def chat_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids that the chat template gives a single user message."""
    text = f"{BOS}{TURN_START}user\n{prompt}{TURN_END}\n{TURN_START}model\n"
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def shares_at(step: int) -> Mapping[str, float]:
    """Shares of the tasks at a step of training."""
    return SHARES[max(begin for begin in SHARES if begin <= step)]


def training_items(rng: random.Random, shares: Mapping[str, float]) -> Iterator[tasks.Item]:
    """Endless items of all sizes that are not held out, of tasks in these shares."""
    while True:
        (task,) = rng.choices(list(shares), shares.values())
        sizes = tasks.TASKS[task].sizes
        share = rng.random() ** (2 if task in SHORT_OFTEN else 1)
        item = tasks.make_item(task, rng, sizes[int(share * len(sizes))])
        if not item.held_out:
            yield item


def pack(
    tokenizer: Tokenizer,
    items: Callable[[random.Random], Iterator[tasks.Item]],
    *,
    rows: int,
    canvas: int,
    vocab: int,
    seed: int,
) -> Rows:
    """Fill `rows` rows with what `items` draws; the same seed gives the same batch."""
    rng = random.Random(seed)  # noqa: S311 -- reproducible, not secret
    generator = torch.Generator().manual_seed(seed)
    packed = _empty(rows)
    used = [0] * rows
    misfits = 0
    for number, item in enumerate(items(rng)):
        length, columns = _lay_out(tokenizer, item, canvas, rng)
        fitting = [row for row in range(rows) if used[row] + length <= ROW]
        if not fitting:
            misfits += 1
            if misfits == 4 * rows:  # by now the gaps are small
                break
            continue
        row = max(fitting, key=used.__getitem__)  # the tightest
        place = slice(used[row], used[row] + length)
        for name, values in columns.items():
            getattr(packed, name)[row, place] = torch.tensor(values)
        packed.item[row, place] = number
        used[row] += length
    _add_noise(packed, vocab, generator)
    return packed


def _empty(rows: int) -> Rows:
    def full(value: int) -> torch.Tensor:
        return torch.full((rows, ROW), value, dtype=torch.int64)

    return Rows(
        tokens=full(token_id(PAD)),
        targets=full(IGNORED),
        item=full(-1),
        position=full(0),
        view=full(0),
        start=full(0),
    )


def _lay_out(
    tokenizer: Tokenizer, item: tasks.Item, canvas: int, rng: random.Random
) -> tuple[int, dict[str, list[int]]]:
    """Tokens of an item in a row, still clean."""
    prompt = chat_ids(tokenizer, item.prompt)
    answer = [*tokenizer.encode(item.answer, add_special_tokens=False).ids, token_id(TURN_END)]
    count = -(-len(answer) // canvas)
    answer += [token_id(PAD)] * (count * canvas - len(answer))
    chosen = sorted(rng.sample(range(count), min(count, VIEWS)))
    chosen += [chosen[-1]] * (VIEWS - len(chosen))
    clean = prompt + answer[: chosen[-1] * canvas]
    columns = {
        "tokens": list(clean),
        "targets": [IGNORED] * len(clean),
        "position": list(range(len(clean))),
        "view": [0] * len(clean),
        "start": [0] * len(clean),
    }
    template = rng.random() < TEMPLATES
    for number, index in enumerate(chosen, start=1):
        text = judged = answer[index * canvas : (index + 1) * canvas]
        if index == 0 and template:
            text, judged = _with_holes(tokenizer, item.answer, canvas, rng)
            template = False
        start = len(prompt) + index * canvas
        columns["tokens"] += text
        columns["targets"] += judged
        columns["position"] += range(start, start + canvas)
        columns["view"] += [number] * canvas
        columns["start"] += [start] * canvas
    return len(columns["tokens"]), columns


def _with_holes(
    tokenizer: Tokenizer, answer: str, canvas: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """An answer's first canvas as a template: its tokens, and the targets of its holes."""
    words = list(re.finditer(r"\w+", answer))
    holes = sorted(rng.sample(words, min(len(words), rng.randint(1, MOST_HOLES))), key=_begin)
    tokens: list[int] = []
    targets: list[int] = []
    end = 0
    for hole in holes:
        fixed = tokenizer.encode(answer[end : hole.start()], add_special_tokens=False).ids
        filled = tokenizer.encode(hole.group(), add_special_tokens=False).ids
        filled += [token_id(PAD)] * rng.randint(0, MOST_SLACK)
        tokens += fixed + filled
        targets += [IGNORED] * len(fixed) + filled
        end = hole.end()
    tokens += tokenizer.encode(answer[end:], add_special_tokens=False).ids
    tokens += [token_id(TURN_END)] + [token_id(PAD)] * canvas
    targets += [IGNORED] * (len(tokens) - len(targets))
    return tokens[:canvas], targets[:canvas]


def _begin(word: re.Match[str]) -> int:
    return word.start()


def _add_noise(packed: Rows, vocab: int, generator: torch.Generator) -> None:
    """Replace judged tokens of every view by uniform ones, at a level of its own from U(0, 1)."""
    # One level a view: views are told apart by item and number, both small.
    levels = torch.rand(
        packed.item.shape[0], int(packed.item.max()) + 1, VIEWS + 1, generator=generator
    )
    row = torch.arange(packed.item.shape[0])[:, None]
    level = levels[row, packed.item.clamp(min=0), packed.view]
    drawn = torch.rand(level.shape, generator=generator)
    noise = torch.randint(vocab, level.shape, generator=generator)
    noised = (packed.targets != IGNORED) & (drawn < level)
    packed.tokens.copy_(torch.where(noised, noise, packed.tokens))
