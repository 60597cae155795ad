"""A finished text with holes loses its slack, and nothing else."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.rewrite import Slack
from vllm_diffusion.constrain.slack import without_slack

if TYPE_CHECKING:
    from vllm_diffusion.records import Commit

PAD, END = 0, 1


def compacted(
    tokens: list[int],
    hole: list[int],
    *,
    shown: int | None = None,
    width: int | None = None,
    pad: int = PAD,
    end: int = -1,
) -> tuple[list[int], list[int]]:
    """(committed tokens, their rows) of one canvas, run beside one that has no slack."""
    length = len(tokens)
    place = torch.arange(length)
    shown = length if shown is None else shown
    slack = Slack(
        shown=torch.stack([place < shown, place >= 0]),
        hole=torch.stack([torch.isin(place, torch.tensor(hole)), place < 0]),
        pad=torch.tensor([pad, -1]),
        end=torch.tensor([end, -1]),
    )
    argmax = torch.tensor([tokens, [PAD] * length])
    valid = torch.stack([place < (width or length), place >= 0])
    commit = without_slack(slack, argmax, valid)
    assert_whole(commit, argmax)
    count = int(commit.count[0])
    return commit.tokens[0, :count].tolist(), commit.rows[0, :count].tolist()


def assert_whole(commit: Commit, argmax: torch.Tensor) -> None:
    """The second canvas, full of pads that nobody calls slack, commits everything."""
    assert int(commit.count[1]) == argmax.shape[1]
    assert torch.equal(commit.tokens[1], argmax[1])
    assert commit.rows[1].tolist() == list(range(argmax.shape[1]))
    assert all(sorted(rows) == list(range(argmax.shape[1])) for rows in commit.rows.tolist())


def test_pads_in_holes_are_dropped_and_fixed_ones_stay() -> None:
    said, rows = compacted([5, 6, PAD, PAD, 7, PAD, 8, END], hole=[1, 2, 6])
    assert said == [5, 6, PAD, 7, PAD, 8, END]
    assert rows == [0, 1, 3, 4, 5, 6, 7]


def test_slack_is_dropped_wherever_it_stands_in_a_hole() -> None:
    assert compacted([PAD, 6, PAD, 7, PAD], hole=[0, 1, 2, 3, 4]) == ([6, 7], [1, 3])


def test_context_behind_the_shown_rows_is_never_said() -> None:
    assert compacted([5, 6, 7, 8], hole=[0, 1], shown=2) == ([5, 6], [0, 1])


def test_rows_beyond_the_width_are_never_said() -> None:
    assert compacted([5, 6, 7, 8], hole=[0], width=3) == ([5, 6, 7], [0, 1, 2])


def test_an_end_stands_behind_an_answer_with_slack_and_in_place_of_slack() -> None:
    assert compacted([5, PAD, 6, 8], hole=[0, 1, 2], shown=3, end=END) == ([5, 6, END], [0, 2, 1])
    assert compacted([5, 4, 6, 8], hole=[0, 1, 2], shown=3, end=END) == ([5, 4, 6], [0, 1, 2])
    assert compacted([PAD, PAD, 8], hole=[0, 1], shown=2, end=END) == ([END], [0])


def test_without_a_pad_nothing_is_slack() -> None:
    assert compacted([0, 1, 2], hole=[0, 1, 2], pad=-1) == ([0, 1, 2], [0, 1, 2])


def test_random_canvases_against_a_loop() -> None:
    rng = random.Random(4)
    for _ in range(300):
        length = rng.randint(1, 12)
        tokens = [rng.choice([PAD, END, 5, 6]) for _ in range(length)]
        hole = [at for at in range(length) if rng.random() < 0.5]
        shown, width = rng.randint(1, length), rng.randint(1, length)
        end = rng.choice([-1, 9])
        most = min(shown, width)
        kept = [at for at in range(most) if at not in hole or tokens[at] != PAD]
        expected = [tokens[at] for at in kept] + ([end] if end > 0 and len(kept) < most else [])
        said, rows = compacted(tokens, hole, shown=shown, width=width, end=end)
        assert said == expected
        assert rows[: len(kept)] == kept
