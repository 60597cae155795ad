"""The stopping rules: the published one beside its criteria, the others by their properties."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    StableAndConfidentStoppingCriteria,
)

from vllm_diffusion.denoise.stop import MAJORITY, ended, low_doubt, stable_and_confident

LENGTH, VOCAB, STEPS = 12, 20, 14
CONFIDENCE = 0.05


def settling_logits(seed: int) -> list[Tensor]:
    """Logits [1, L, V] of one canvas: sure or unsure, moving or still, in every combination."""
    generator = torch.Generator().manual_seed(seed)
    logits, steps = torch.randn(1, LENGTH, VOCAB, generator=generator), []
    for _ in range(STEPS):
        if torch.rand((), generator=generator) < 0.3:
            moved = int(torch.randint(LENGTH, (), generator=generator))
            logits = logits.clone()
            logits[0, moved] = torch.randn(VOCAB, generator=generator)
        scale = 60.0 if torch.rand((), generator=generator) < 0.7 else 6.0
        steps.append(logits * scale)
    return steps


def run_ours(
    steps: list[Tensor], stability: int, valid: Tensor | None = None, confidence: float = CONFIDENCE
) -> list[bool]:
    """Feed the rule as the canvas pool does: history oldest first, -1 before it exists."""
    length = steps[0].shape[1]
    history = torch.full((1, stability, length), -1)
    valid = torch.ones(1, length, dtype=torch.bool) if valid is None else valid
    outcome = []
    for logits in steps:
        argmax = logits.argmax(dim=-1)
        entropy = Categorical(logits=logits).entropy()
        verdict = stable_and_confident(argmax, history, entropy, torch.tensor([confidence]), valid)
        outcome.append(bool(verdict))
        if stability:
            history = torch.cat([history[:, 1:], argmax[:, None]], dim=1)
    return outcome


@for_each(stability=[0, 1, 2, 3])
def test_equals_the_published_criteria_at_every_step(stability: int) -> None:
    seen = set()
    for seed in range(40):
        steps = settling_logits(seed)
        criteria = StableAndConfidentStoppingCriteria(stability, CONFIDENCE)
        theirs = [bool(criteria(logits.argmax(dim=-1), logits)) for logits in steps]
        assert run_ours(steps, stability) == theirs, f"sequence {seed}"
        seen.update(theirs)
    assert seen == {True, False}, "the sequences exercised only one outcome"


@for_each(stability=[1, 2, 3])
def test_needs_that_many_unchanged_steps(stability: int) -> None:
    still = [torch.eye(VOCAB)[:LENGTH][None] * 100.0] * 6
    assert run_ours(still, stability) == [step >= stability for step in range(6)]


def test_one_moving_position_keeps_the_canvas_open() -> None:
    steps = []
    for step in range(5):
        logits = torch.eye(VOCAB)[:LENGTH][None] * 100.0
        logits[0, 7] = torch.eye(VOCAB)[step] * 100.0
        steps.append(logits)
    assert not any(run_ours(steps, 1))


def test_stability_zero_asks_for_confidence_alone() -> None:
    sure, unsure = torch.eye(VOCAB)[:LENGTH][None] * 100.0, torch.zeros(1, LENGTH, VOCAB)
    assert run_ours([sure, unsure, sure], 0) == [True, False, True]


def test_the_threshold_is_strict_and_per_canvas() -> None:
    entropy = torch.full((3, LENGTH), 0.25)
    argmax = torch.zeros(3, LENGTH, dtype=torch.int64)
    verdict = stable_and_confident(
        argmax,
        argmax[:, None],
        entropy,
        torch.tensor([0.25, 0.2500001, 0.2]),
        torch.ones(3, LENGTH, dtype=torch.bool),
    )
    assert verdict.tolist() == [False, True, False]


@for_each(width=[1, 5, LENGTH - 1], rest=[0.0, 1e3, float("nan")])
def test_padding_has_no_say(width: int, rest: float) -> None:
    # Padding rows carry whatever the forward left there: other ids every step, any entropy.
    valid = (torch.arange(LENGTH) < width)[None]
    for seed in range(10):
        steps = settling_logits(seed)
        narrow = run_ours([logits[:, :width] for logits in steps], 1)
        history, outcome = torch.full((1, 1, LENGTH), -1), []
        for step, logits in enumerate(steps):
            argmax, entropy = logits.argmax(dim=-1), Categorical(logits=logits).entropy()
            argmax[:, width:], entropy[:, width:] = step, rest
            verdict = stable_and_confident(
                argmax, history, entropy, torch.tensor([CONFIDENCE]), valid
            )
            outcome.append(bool(verdict))
            history = argmax[:, None]
        assert outcome == narrow


@for_each(stability=[0, 1, 2, 3])
def test_a_request_may_ask_for_fewer_steps_of_stability_than_are_remembered(stability: int) -> None:
    # The argmax of three steps ago differs, then it held; a step that was never taken is -1.
    argmax = torch.tensor([[5, 6]])
    for remembered, held in ([[4, 6], [5, 6], [5, 6]], 2), ([[-1, -1], [-1, -1], [5, 6]], 1):
        history = torch.tensor([remembered])
        verdict = stable_and_confident(
            argmax,
            history,
            torch.zeros(1, 2),
            torch.tensor([0.1]),
            torch.ones(1, 2, dtype=torch.bool),
            torch.tensor([stability]),
        )
        alone = stable_and_confident(
            argmax,
            history[:, 3 - stability :],
            torch.zeros(1, 2),
            torch.tensor([0.1]),
            torch.ones(1, 2, dtype=torch.bool),
        )
        assert bool(verdict) == bool(alone) == (stability <= held)


# ---- sure at once ----


def sure(
    top_prob: list[float],
    threshold: float,
    *,
    last_top_prob: list[float] | None = None,
    overturned: int | None = None,
    width: int | None = None,
) -> bool:
    """The verdict on one canvas; ``overturned`` had another argmax in the step before."""
    length = len(top_prob)
    argmax = torch.arange(length)[None]
    last = argmax.clone()
    if overturned is not None:
        last[0, overturned] += 1
    return bool(
        low_doubt(
            argmax,
            torch.tensor([top_prob]),
            last,
            torch.tensor([last_top_prob or [0.0] * length]),
            torch.tensor([threshold]),
            torch.arange(length)[None] < (length if width is None else width),
        )
    )


def test_the_doubt_is_the_number_of_tokens_that_a_sample_would_have_otherwise() -> None:
    probabilities = torch.tensor([[0.97, 0.02, 0.01], [0.9, 0.1, 0.0], [0.2, 0.75, 0.05]])
    drawn = probabilities.multinomial(200_000, replacement=True, generator=torch.manual_seed(0))
    otherwise = float((drawn != probabilities.argmax(dim=1)[:, None]).sum(dim=0).float().mean())
    top_prob = probabilities.max(dim=1).values.tolist()
    assert not sure(top_prob, otherwise - 0.01)
    assert sure(top_prob, otherwise + 0.01)


def test_the_threshold_of_doubt_is_strict_and_zero_is_off() -> None:
    assert not sure([1.0, 1.0], 0.0), "a canvas without any doubt"
    assert not sure([0.75, 1.0], 0.25)
    assert sure([0.75, 1.0], 0.2500001)


def test_doubt_adds_up_so_a_wide_canvas_has_to_be_surer() -> None:
    assert sure([0.99] * 8, 0.1)
    assert not sure([0.99] * 16, 0.1)


@pytest.mark.parametrize(
    ("before", "finished"), [(0.0, True), (0.3, True), (MAJORITY, True), (0.6, False), (1.0, False)]
)
def test_a_canvas_that_takes_back_what_it_believed_goes_on(before: float, finished: bool) -> None:
    last = [1.0, before, 1.0]
    assert sure([1.0, 0.99, 1.0], 0.1, last_top_prob=last, overturned=1) is finished
    assert sure([1.0, 0.99, 1.0], 0.1, last_top_prob=last), "an argmax that held was taken back"


@for_each(rest=[0.0, 0.5, float("nan")])
def test_rows_beyond_the_canvas_are_neither_doubted_nor_taken_back(rest: float) -> None:
    padded = [0.99, 0.99, rest, rest]
    assert sure(padded, 0.03, last_top_prob=[1.0] * 4, overturned=3, width=2)
    assert not sure(padded, 0.03, last_top_prob=[1.0] * 4, overturned=1, width=2)
    assert not sure(padded, 0.01, width=2)


@given(
    top_prob=st.lists(st.floats(0.5, 1.0, width=32), min_size=1, max_size=20),
    bounds=st.tuples(st.floats(0, 3, width=32), st.floats(0, 3, width=32)),
)
@settings(max_examples=100, deadline=None)
def test_whoever_is_sure_is_sure_under_a_larger_threshold(
    top_prob: list[float], bounds: tuple[float, float]
) -> None:
    small, large = sorted(bounds)
    assert sure(top_prob, small) <= sure(top_prob, large)


def test_a_probability_that_is_no_number_finishes_nothing() -> None:
    assert not sure([1.0, float("nan")], 1e6)


def test_each_canvas_has_its_own_threshold_of_doubt() -> None:
    argmax, valid = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)
    verdict = low_doubt(
        argmax,
        torch.full((3, 2), 0.9),
        argmax,
        torch.zeros(3, 2),
        torch.tensor([0.0, 0.15, 0.25]),
        valid,
    )
    assert verdict.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("tokens", "upto"),
    [
        ([1, 2, 3, 4], 0),
        ([8, 2, 3, 4], 1),
        ([1, 9, 8, 4], 2),
        ([1, 9, 0, 0], 2),
        ([1, 0, 9, 4], 0),
        ([0, 0, 0, 0], 0),
        ([1, 2, 3, 9], 4),
        ([9, 0, 0, 9], 1),
    ],
)
def test_a_canvas_ends_with_its_first_end_before_every_mask(tokens: list[int], upto: int) -> None:
    ends, valid = torch.tensor([[9, 8, -1]]), torch.ones(1, 4, dtype=torch.bool)
    assert ended(torch.tensor([tokens]), ends, 0, valid).tolist() == [upto]
    # What is beyond a canvas's width is none of it.
    short = torch.arange(4)[None] < 1
    assert ended(torch.tensor([tokens]), ends, 0, short).tolist() == [1 if upto == 1 else 0]
    nothing = torch.full_like(ends, -1)
    assert ended(torch.tensor([tokens]), nothing, 0, valid).tolist() == [0]
