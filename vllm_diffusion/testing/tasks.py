"""Small tasks with exact answers, to train a tiny model on and to judge decoding rules with.

Takes a task's name, a size and a random generator. Gives an `Item`: a prompt and one right answer;
`solved` judges any text. Every task stresses another side of denoising:

    json    people in sentences to a JSON list: copying, with a tail of padding (size: people)
    sudoku  4x4, one solution: constraints without an order (size: empty cells)
    chain   running sums modulo ten, term by term: a wave from left to right (size: terms)
    joint   one free colour, the same everywhere: rows that depend on each other (size: words)
    edit    replace a word in a given text (size: sentences)
    count   numbers up to a last one: outputs over several canvases (size: numbers)

Sizes grow harder. An item is held out, and never trained on, if the checksum of its prompt says so.
"""
# ruff: noqa: SIM905 - lists of words are read as text

from __future__ import annotations

import json
import random
import re
import zlib
from collections import deque
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HELD_OUT = 16
"""One prompt in this many is never trained on."""

DRAWS = 3000
"""Draws without a new held-out item after which a size counts as exhausted."""

NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paul "
    "Quinn Rosa Sam Tina Uma Victor Wendy Yusuf"
).split()
CITIES = "Paris Rome Berlin Madrid Oslo Lima Cairo Tokyo Delhi Quito Sofia Dublin".split()
JOBS = "nurse baker pilot judge chef coder actor miner clerk tutor".split()
COLOURS = "red blue green black".split()
WORDS = (
    "cat dog sun moon tree fish bird door lamp ship rain snow sand gold wolf bear frog leaf rose "
    "corn milk salt rope bell"
).split()
SYLLABLES = "ka lo mi ra ne tu so ve di pa".split()
KEYS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

SENTENCES = (
    "{name}, {age}, is a {job} in {city}.",
    "In {city} lives {name}, a {job} aged {age}.",
    "{name} from {city} works as a {job} at {age}.",
)

INVENTED_FROM = 3
"""From this many people on, every second name is made of syllables."""


@dataclass(frozen=True, slots=True)
class Item:
    """A question, and one right answer; `joint` has others."""

    task: str
    size: int
    prompt: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether training never sees this prompt."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT == 0


@dataclass(frozen=True, slots=True)
class Task:
    """Writes items and judges answers; sizes outside `sizes` are not made."""

    sizes: range
    easy: range
    """Sizes to start with."""
    hard: range
    """The largest sizes: where rules can be told apart."""
    write: Callable[[random.Random, int], tuple[str, str]]
    """Prompt and right answer of a size."""
    accepts: Callable[[Item, str], bool]
    """Whether a text, stripped of blanks around it, is right."""


def make_item(task: str, rng: random.Random, size: int) -> Item:
    """Item of `task`; KeyError for an unknown one, ValueError for a size it does not have."""
    made = TASKS[task]
    if size not in made.sizes:
        raise ValueError(
            f"Expected a size of {task} from {made.sizes[0]} to {made.sizes[-1]}, but got {size}."
        )
    prompt, answer = made.write(rng, size)
    return Item(task, size, prompt, answer)


def held_out_items(task: str, count: int, *, seed: int, sizes: Sequence[int]) -> Iterator[Item]:
    """Different items that training never saw, sizes in turn; the same for the same seed.

    A size that has no more is left out; ValueError where none is left.
    """
    rng = random.Random(f"{task}:{seed}")  # noqa: S311 -- reproducible, not secret
    seen: set[str] = set()
    turn = deque(sizes)
    while len(seen) < count:
        if not turn:
            raise ValueError(f"{task} has {len(seen)} held-out items of these sizes, not {count}.")
        drawn = (make_item(task, rng, turn[0]) for _ in range(DRAWS))
        item = next((item for item in drawn if item.held_out and item.prompt not in seen), None)
        if item is None:
            turn.popleft()
            continue
        turn.rotate(-1)
        seen.add(item.prompt)
        yield item


def solved(item: Item, text: str) -> bool:
    """Whether `text` answers the item exactly."""
    return TASKS[item.task].accepts(item, text.strip())


def _equal(item: Item, text: str) -> bool:
    return text == item.answer


# ---- json ---------------------------------------------------------------------------------------


def _person(rng: random.Random, *, invented: bool) -> dict[str, str | int]:
    made_up = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize()
    return {
        "name": made_up if invented else rng.choice(NAMES),
        "age": rng.randint(18, 80),
        "city": rng.choice(CITIES),
        "job": rng.choice(JOBS),
    }


def _people(rng: random.Random, size: int) -> tuple[str, list[dict[str, str | int]]]:
    people = [_person(rng, invented=size >= INVENTED_FROM and n % 2 == 1) for n in range(size)]
    return " ".join(rng.choice(SENTENCES).format(**person) for person in people), people


def _json(rng: random.Random, size: int) -> tuple[str, str]:
    text, people = _people(rng, size)
    return text, json.dumps(people, separators=(",", ":"))


def _same_json(item: Item, text: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(item.answer))
    except (ValueError, RecursionError):  # not JSON; nested beyond what Python reads
        return False


# ---- sudoku -------------------------------------------------------------------------------------

UNITS = tuple(
    [tuple(4 * line + cell for cell in range(4)) for line in range(4)]
    + [tuple(4 * cell + line for cell in range(4)) for line in range(4)]
    + [
        tuple(8 * top + 2 * left + 4 * row + column for row, column in product((0, 1), repeat=2))
        for top, left in product((0, 1), repeat=2)
    ]
)
"""Rows, columns and boxes: twelve sets of four cells that hold each digit once."""


@cache
def _grids() -> tuple[str, ...]:
    """All 288 solved grids, as 16 digits each."""
    rows = ["".join(row) for row in permutations("1234")]
    grids = ("".join(four) for four in product(rows, repeat=4))
    return tuple(
        grid
        for grid in grids
        if all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)
    )


@cache
def _confusions(solution: str) -> tuple[int, ...]:
    """Smallest sets of cells, as bit masks, that another grid could fill differently."""
    masks = sorted(
        (
            sum(1 << cell for cell in range(16) if grid[cell] != solution[cell])
            for grid in _grids()
            if grid != solution
        ),
        key=int.bit_count,
    )
    smallest: list[int] = []
    for mask in masks:
        if not any(mask & known == known for known in smallest):
            smallest.append(mask)
    return tuple(smallest)


def _sudoku(rng: random.Random, size: int) -> tuple[str, str]:
    while True:
        solution = rng.choice(_grids())
        confusions = _confusions(solution)
        empty = 0
        for cell in rng.sample(range(16), 16):
            tried = empty | 1 << cell
            if any(tried & mask == mask for mask in confusions):
                continue  # without this clue the puzzle has another solution
            empty = tried
            if empty.bit_count() == size:
                puzzle = "".join("0" if empty >> n & 1 else solution[n] for n in range(16))
                return f"sudoku {_rows(puzzle)}", _rows(solution)


def _rows(grid: str) -> str:
    return "/".join(grid[start : start + 4] for start in range(0, 16, 4))


# ---- chain --------------------------------------------------------------------------------------


def _chain(rng: random.Random, size: int) -> tuple[str, str]:
    # Sums of small terms are near the sum before them, which is where learning to add begins:
    # of two digits up to nine, neither alone says anything about the sum modulo ten.
    largest = rng.randint(1, 9)
    total, terms, sums = 0, [], []
    for key in KEYS[:size]:
        digit = rng.randint(0, largest)
        total = (total + digit) % 10
        terms.append(f"{key}{digit}")
        sums.append(f"{key}{digit}={total}")
    return "sum " + " ".join(terms), " ".join(sums)


# ---- joint --------------------------------------------------------------------------------------


def _joint(rng: random.Random, size: int) -> tuple[str, str]:
    words, colour = rng.sample(WORDS, size), rng.choice(COLOURS)
    return "paint " + " ".join(words), ", ".join(f"{colour} {word}" for word in words)


def _one_colour(item: Item, text: str) -> bool:
    words = item.prompt.split()[1:]
    return any(text == ", ".join(f"{colour} {word}" for word in words) for colour in COLOURS)


# ---- edit ---------------------------------------------------------------------------------------


def _edit(rng: random.Random, size: int) -> tuple[str, str]:
    text, people = _people(rng, size)
    kind, choices = rng.choice((("city", CITIES), ("job", JOBS), ("name", NAMES)))
    old = str(rng.choice(people)[kind])
    new = rng.choice([word for word in choices if word not in text])
    return f"{old} becomes {new}: {text}", re.sub(rf"\b{old}\b", new, text)


# ---- count --------------------------------------------------------------------------------------


def _count(rng: random.Random, size: int) -> tuple[str, str]:
    first = rng.randint(10, 99)
    numbers = range(first, first + size)
    # The end beside every number, so that where to stop is seen where the number stands.
    text = " ".join(f"{number}/{numbers[-1]}" for number in numbers)
    return f"count {numbers[0]} to {numbers[-1]}", text


TASKS: dict[str, Task] = {
    "json": Task(range(1, 5), range(1, 3), range(4, 5), _json, _same_json),
    "sudoku": Task(range(4, 11), range(4, 8), range(10, 11), _sudoku, _equal),
    "chain": Task(range(4, 41), range(4, 11), range(24, 41), _chain, _equal),
    "joint": Task(range(2, 13), range(2, 7), range(10, 13), _joint, _one_colour),
    "edit": Task(range(1, 4), range(1, 2), range(3, 4), _edit, _equal),
    "count": Task(range(4, 41), range(4, 25), range(25, 41), _count, _equal),
}
