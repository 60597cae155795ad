"""A draft loses the share it is told to noise, the same positions every time."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion.denoise.draft import first_step, noised_draft, seed_canvas_from_draft
from vllm_diffusion.denoise.rng import Purpose, philox, split_seed, uniform

DRAFT = list(range(100, 2100))


@for_each(level=[0.01, 0.3, 0.5, 0.9])
def test_the_share_of_noise_is_the_level(level: float) -> None:
    noised = noised_draft(DRAFT, seed=3, start=7, level=level)
    assert all(ours in {-1, theirs} for ours, theirs in zip(noised, DRAFT, strict=True))
    # Five standard deviations of a binomial.
    spread = 5 * (level * (1 - level) * len(DRAFT)) ** 0.5
    assert noised.count(-1) == pytest.approx(level * len(DRAFT), abs=spread)


def test_at_level_1_nothing_is_left() -> None:
    assert set(noised_draft(DRAFT, seed=3, start=7, level=1)) == {-1}


def test_seed_and_absolute_position_decide() -> None:
    whole = noised_draft(DRAFT, seed=3, start=7, level=0.5)
    assert noised_draft(DRAFT[20:50], seed=3, start=27, level=0.5) == whole[20:50]
    assert noised_draft(DRAFT, seed=4, start=7, level=0.5) != whole
    assert noised_draft(DRAFT, seed=3, start=8, level=0.5) != whole


def test_more_noise_takes_more_of_the_same() -> None:
    little = noised_draft(DRAFT, seed=3, start=7, level=0.2)
    much = noised_draft(DRAFT, seed=3, start=7, level=0.6)
    assert all(b == -1 for a, b in zip(little, much, strict=True) if a == -1)


def test_the_draw_shares_no_counter_with_another_purpose() -> None:
    key, position = torch.tensor(split_seed(3)), torch.arange(50)
    step = torch.zeros((), dtype=torch.int64)
    draws = {
        purpose: tuple(uniform(philox(key, position, step, purpose)[0]).tolist())
        for purpose in Purpose
    }
    assert len(set(draws.values())) == len(Purpose)


@pytest.mark.parametrize(
    ("level", "steps", "first"),
    [(1.0, 48, 0), (0.5, 48, 24), (0.25, 48, 36), (0.001, 48, 47), (0.5, 1, 0), (0.99, 7, 0)],
)
def test_the_schedule_sets_in_where_it_has_as_much_noise(
    level: float, steps: int, first: int
) -> None:
    assert first_step(level, steps) == first
    assert first < steps


def test_pinned_positions_are_no_noise() -> None:
    pinned = (3, 4, 900)
    begun, first = seed_canvas_from_draft(
        DRAFT, pinned=pinned, level=0.9, seed=3, start=7, steps=48
    )
    assert [begun[at] for at in pinned] == [DRAFT[at] for at in pinned]
    free = [at for at in range(len(DRAFT)) if at not in pinned]
    noised = noised_draft(DRAFT, seed=3, start=7, level=0.9)
    assert [begun[at] for at in free] == [noised[at] for at in free]
    assert first == first_step(0.9, 48)
