"""Scores, forwards, and the arm to recommend."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from vllm_diffusion.tune.compare import (
    Outcome,
    paired,
    percentile,
    recommend,
    repeated_share,
    summarise,
)

ONE = Outcome(
    score=1.0,
    finished=True,
    empty=False,
    repeated=0.0,
    tokens=60,
    denoise=4,
    commits=1,
    steps=[3, 1],
)


def answers(scores, **changed):
    return [replace(ONE, score=score, **changed) for score in scores]


def test_tokens_per_forward_are_a_ratio_of_sums():
    slow = replace(ONE, tokens=20, denoise=14, commits=1, steps=[14], score=0.0, finished=False)
    told = summarise([ONE, slow])
    assert told.tpf_all == 80 / 20
    assert told.tpf_denoise == 80 / 18
    assert told.score == told.finished == 50
    assert told.steps == 6
    assert (told.p50, told.p90) == (3, pytest.approx(3 + 0.8 * 11))


def test_an_answer_without_a_canvas_counts():
    told = summarise([replace(ONE, tokens=0, denoise=0, commits=0, steps=[], empty=True)])
    assert (told.tpf_all, told.steps, told.empty) == (0, 0, 100)


def test_a_difference_is_of_the_same_items():
    difference, error = paired(answers([1, 1, 0, 1]), answers([0, 1, 1, 1]))
    assert difference == 0
    assert error == pytest.approx(100 * math.sqrt(2 / 3) / 2)
    assert paired(answers([1, 0]), answers([1, 0])) == (0, 0)
    assert math.isnan(paired(answers([1]), answers([1]))[1])


def test_items_must_be_the_same():
    with pytest.raises(ValueError, match="zip"):
        paired(answers([1]), answers([1, 1]))


@pytest.mark.parametrize(
    ("arm", "wins"),
    [
        (answers([1] * 9 + [0], denoise=2), True),  # within its error
        (answers([1] * 6 + [0] * 4, denoise=2), False),
        (answers([1] * 10, denoise=5), False),  # slower
        (answers([1] * 10, denoise=2), True),
        (answers([1] * 10, denoise=2, finished=False), False),
        (answers([1] * 10, denoise=2, empty=True), False),
        (answers([1] * 10, denoise=2, repeated=0.5), False),
    ],
)
def test_the_fastest_that_loses_nothing_is_recommended(arm, wins):
    arms = {"reference": answers([1] * 10), "arm": arm}
    assert recommend(arms, baseline="reference") == ("arm" if wins else "reference")


def test_a_tolerance_lets_points_go():
    arms = {"reference": answers([1] * 10), "arm": answers([1] * 6 + [0] * 4, denoise=2)}
    assert recommend(arms, baseline="reference", tolerance=20) == "reference"
    assert recommend(arms, baseline="reference", tolerance=24) == "arm"


def test_one_item_has_no_error_and_forgives_nothing():
    arms = {"reference": answers([1]), "arm": answers([0.9], denoise=2)}
    assert recommend(arms, baseline="reference") == "reference"


def test_percentiles_and_loops():
    assert percentile([7], 90) == 7
    assert percentile([1, 2, 3], 50) == 2
    assert repeated_share(range(20)) == 0
    assert repeated_share([1, 2] * 10) == pytest.approx(1 - 2 / 13)
    assert repeated_share([1]) == 0
