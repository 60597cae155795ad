"""Which positions a step reveals, against loops in plain Python."""

from __future__ import annotations

import math
import random

import torch
from helpers.cases import for_each

from vllm_diffusion.denoise.reveal import revealed, scheduled

INF = math.inf


def even_split(block: int, steps: int) -> list[int]:
    """SDAR's schedule, step by step."""
    return [block // steps + (1 if step < block % steps else 0) for step in range(steps)]


def reveal_one(score: list[float], is_open: list[bool], tau: float, least: int) -> set[int]:
    """One canvas: those above the threshold, or the best ones if they are fewer than the floor."""
    places = [at for at, free in enumerate(is_open) if free]
    above = {at for at in places if tau > 0 and score[at] > tau}
    if len(above) >= least:
        return above
    known = sorted((at for at in places if math.isfinite(score[at])), key=lambda at: -score[at])
    unknown = [at for at in places if not math.isfinite(score[at])]
    return set((known + unknown)[:least])


@for_each(block=[1, 4, 8, 32], steps=[1, 3, 4, 7, 8, 32, 40])
def test_a_block_is_spread_evenly_over_the_steps(block: int, steps: int) -> None:
    shares = even_split(block, steps)
    assert sum(shares) == block
    step = torch.arange(steps)
    limit = torch.full((steps,), steps)
    # However much is open, the share of a step is the block's, but for the last one.
    for num_open in range(block + 1):
        asked = scheduled(step, limit, torch.full((steps,), num_open), block).tolist()
        assert asked == [*(min(share, num_open) for share in shares[:-1]), num_open]


@for_each(open_at_first=[0, 1, 5, 32], steps=[1, 3, 12, 32, 40])
def test_what_is_open_is_spread_over_the_steps_that_are_left(
    open_at_first: int, steps: int
) -> None:
    left, shares = open_at_first, []
    for step in range(steps):
        (share,) = scheduled(
            torch.tensor([step]), torch.tensor([steps]), torch.tensor([left]), None
        ).tolist()
        assert share == math.ceil(left / (steps - step))
        left -= share
        shares.append(share)
    assert left == 0
    # Where nothing else reveals, it is the even split of the masks.
    assert shares == even_split(open_at_first, steps)


def test_past_the_last_step_everything_is_revealed() -> None:
    step, limit = torch.tensor([4, 9]), torch.tensor([4, 4])
    for block in (None, 8):
        assert scheduled(step, limit, torch.tensor([3, 5]), block).tolist() == [3, 5]


@for_each(seed=range(60))
def test_equals_the_loop(seed: int) -> None:
    rng = random.Random(seed)
    length = rng.choice((1, 2, 7, 32))
    # Few distinct scores: ties everywhere, at the threshold too.
    values = [0.0, 0.25, 0.5, 0.75, 1.0, -INF, math.nan, rng.random(), -rng.random()]
    rows = []
    for _ in range(6):
        is_open = [rng.random() < rng.choice((0.0, 0.5, 1.0)) for _ in range(length)]
        score = [rng.choice(values) for _ in range(length)]
        tau = rng.choice((0.0, 0.25, 0.5, 0.75, 0.9, 1.0))
        rows.append((score, is_open, tau, rng.randint(0, sum(is_open))))
    score, is_open, tau, least = zip(*rows, strict=True)
    found = revealed(
        torch.tensor(score), torch.tensor(is_open), torch.tensor(tau), torch.tensor(least)
    )
    for row, mask in zip(rows, found.tolist(), strict=True):
        assert {at for at, yes in enumerate(mask) if yes} == reveal_one(*row)


def test_of_equal_scores_the_lowest_position_comes_first() -> None:
    score = torch.tensor([[0.5, 0.7, 0.5, 0.7, 0.5, 0.7]])
    is_open = torch.tensor([[True, False, True, True, True, True]])
    for least, places in enumerate([[], [3], [3, 5], [0, 3, 5], [0, 2, 3, 5], [0, 2, 3, 4, 5]]):
        found = revealed(score, is_open, torch.zeros(1), torch.tensor([least]))
        assert found[0].nonzero()[:, 0].tolist() == places


def test_the_threshold_itself_is_not_above_it() -> None:
    score = torch.tensor([[0.85, 0.8500001, 0.9]])
    is_open = torch.ones(1, 3, dtype=torch.bool)
    found = revealed(score, is_open, torch.tensor([0.85]), torch.tensor([1]))
    assert found.tolist() == [[False, True, True]]


def test_a_threshold_of_0_is_off_whatever_the_scores() -> None:
    score, is_open = torch.full((1, 3), 0.9), torch.ones(1, 3, dtype=torch.bool)
    found = revealed(score, is_open, torch.zeros(1), torch.tensor([1]))
    assert found.tolist() == [[True, False, False]]
