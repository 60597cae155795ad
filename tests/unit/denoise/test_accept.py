"""The entropy bound, against the published sampler and by its properties; what has held, by its."""

from __future__ import annotations

import torch
from helpers.cases import for_each
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from vllm_diffusion.denoise.accept import DRIFT, entropy_bound, stable_argmax

LENGTH, VOCAB = 24, 50


def published(logits: Tensor, bound: float) -> Tensor:
    """The mask of the published sampler; logits [B, L, V]."""
    sampler = EntropyBoundSampler(
        EntropyBoundSamplerConfig(entropy_bound=bound), logits.shape[1], logits.shape[2], 8
    )
    ids = torch.zeros(logits.shape[:2], dtype=torch.int64)
    sampler.accept_canvas(ids, ids, logits, 1)
    mask = sampler.accepted_token_mask
    assert mask is not None
    return mask


def accept(entropy: Tensor, bound: float, valid: Tensor | None = None) -> Tensor:
    valid = torch.ones(entropy.shape, dtype=torch.bool) if valid is None else valid
    return entropy_bound(entropy, torch.full((entropy.shape[0],), bound), valid)


def sharpened_logits(batch: int, seed: int) -> Tensor:
    """Rows from nearly certain to nearly uniform, so that a bound cuts somewhere in the middle."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(1.5, -1, LENGTH)[torch.randperm(LENGTH, generator=generator)]
    return torch.randn(batch, LENGTH, VOCAB, generator=generator) * scale[:, None]


@for_each(bound=[1e-6, 0.01, 0.1, 1.0, 5.0, 1e3])
def test_equals_the_published_sampler(bound: float) -> None:
    logits = sharpened_logits(64, seed=1)
    assert torch.equal(
        accept(Categorical(logits=logits).entropy(), bound), published(logits, bound)
    )


def tied_logits() -> Tensor:
    """Four distinct rows, each six times: a bound falls inside a group of equal entropies."""
    return sharpened_logits(32, seed=2)[:, :4][:, torch.arange(LENGTH) % 4]


@for_each(bound=[0.1, 2.0, 9.0])
def test_equals_the_published_sampler_up_to_the_choice_among_ties(bound: float) -> None:
    # The published sort is not stable, so which of equal entropies it takes depends on the machine;
    # how many, and of what entropy, does not.
    logits = tied_logits()
    entropy = Categorical(logits=logits).entropy()
    ours, theirs = accept(entropy, bound), published(logits, bound)
    for row in range(len(entropy)):
        taken, expected = entropy[row][ours[row]], entropy[row][theirs[row]]
        assert torch.equal(taken.sort().values, expected.sort().values)
    assert int(ours.sum(dim=1).min()) < LENGTH, "the bound cut no canvas: no tie was broken"


def test_among_ties_the_leftmost_win() -> None:
    entropy = torch.full((1, LENGTH), 0.5)
    assert accept(entropy, 2.0)[0].tolist() == [True] * 5 + [False] * (LENGTH - 5)
    entropy[0, ::2] = 0.1
    assert accept(entropy, 0.75)[0].nonzero()[:, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


def test_certain_canvas_is_accepted_whole() -> None:
    assert bool(accept(torch.zeros(3, LENGTH), 0.1).all())


# Multiples of 1/64 add up exactly in fp32. With rounding, (sum + e) - e may fall below the sum, in
# the published rule as in ours, which follows it to the last bit.
nats = st.integers(0, 768).map(lambda n: n / 64)


@given(entropy=st.lists(nats, min_size=1, max_size=40), bounds=st.tuples(nats, nats))
@settings(max_examples=200, deadline=None)
def test_a_larger_bound_accepts_a_superset(
    entropy: list[float], bounds: tuple[float, float]
) -> None:
    row = torch.tensor([entropy], dtype=torch.float32)
    small, large = sorted(bounds)
    few, many = accept(row, small), accept(row, large)
    assert bool((many | ~few).all())
    # At least one, and the sure ones first: nothing rejected is surer than something accepted.
    assert int(few.sum()) >= 1
    if not bool(few.all()):
        assert float(row[few].max()) <= float(row[~few].min())


@given(entropy=st.lists(nats, min_size=2, max_size=30))
@settings(max_examples=100, deadline=None)
def test_the_accepted_stay_within_the_bound(entropy: list[float]) -> None:
    row = torch.tensor([entropy], dtype=torch.float32)
    taken = row[accept(row, 0.5)]
    assert float(taken.sum() - taken.max()) <= 0.5


def test_each_canvas_has_its_own_bound() -> None:
    entropy = sharpened_logits(1, seed=3).log_softmax(-1).exp()[..., 0].repeat(3, 1)
    bounds = torch.tensor([0.0, 0.05, 1e6])
    together = entropy_bound(entropy, bounds, torch.ones_like(entropy, dtype=torch.bool))
    for row in range(3):
        assert torch.equal(together[row : row + 1], accept(entropy[:1], float(bounds[row])))
    assert bool(together[2].all())
    assert int(together[0].sum()) < int(together[1].sum()) < LENGTH


@for_each(width=[1, 2, 13, LENGTH - 1], rest=[0.0, 7.0, float("inf"), float("nan")])
def test_padding_neither_accepts_nor_spends(width: int, rest: float) -> None:
    entropy = Categorical(logits=sharpened_logits(16, seed=4)).entropy()
    padded = entropy.clone()
    padded[:, width:] = rest
    valid = (torch.arange(LENGTH) < width).expand(16, LENGTH)
    ours = accept(padded, 0.1, valid)
    assert not bool(ours[:, width:].any())
    assert torch.equal(ours[:, :width], accept(entropy[:, :width], 0.1))
    assert bool(ours.any(dim=1).all())


# ---- what has held ----


def hold(  # one canvas
    top_prob: list[float],
    last_top_prob: list[float],
    threshold: float,
    *,
    moved: tuple[int, ...] = (),
    width: int | None = None,
) -> list[bool]:
    """The mask of a canvas; ``moved`` positions had another argmax in the step before."""
    length = len(top_prob)
    argmax = torch.arange(length)[None]
    last = argmax.clone()
    last[:, list(moved)] += 1
    valid = torch.arange(length)[None] < (length if width is None else width)
    mask = stable_argmax(
        argmax,
        torch.tensor([top_prob]),
        last,
        torch.tensor([last_top_prob]),
        torch.tensor([threshold]),
        valid,
    )
    result: list[bool] = mask[0].tolist()
    return result


def test_a_position_is_held_if_it_is_likely_and_was_so_before() -> None:
    now = [0.95, 0.95, 0.95, 0.85, 0.95]
    before = [0.94, 0.94, 0.80, 0.85, 0.0]
    assert hold(now, before, 0.9, moved=(1,)) == [True, False, False, False, False]


def test_a_threshold_of_zero_holds_nothing_and_a_first_step_holds_nothing() -> None:
    assert not any(hold([1.0, 0.5], [1.0, 0.5], 0.0))
    assert not any(hold([DRIFT / 2, 1.0], [0.0, 0.0], 1e-6)), "there was no step before"


@given(
    rows=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20),
    bounds=st.tuples(st.floats(1e-3, 1), st.floats(1e-3, 1)),
)
@settings(max_examples=100, deadline=None)
def test_a_lower_threshold_holds_a_superset(
    rows: list[tuple[float, float]], bounds: tuple[float, float]
) -> None:
    now, before = (list(each) for each in zip(*rows, strict=True))
    low, high = sorted(bounds)
    many, few = hold(now, before, low), hold(now, before, high)
    assert all(more or not less for more, less in zip(many, few, strict=True))


@for_each(rest=[1.0, float("nan")])
def test_rows_beyond_the_canvas_are_not_held(rest: float) -> None:
    assert hold([1.0, rest], [1.0, rest], 0.9, width=1) == [True, False]


def test_each_canvas_has_its_own_threshold_to_hold() -> None:
    argmax, likely = torch.zeros(3, 1, dtype=torch.int64), torch.full((3, 1), 0.8)
    valid = torch.ones(3, 1, dtype=torch.bool)
    mask = stable_argmax(argmax, likely, argmax, likely, torch.tensor([0.0, 0.75, 0.85]), valid)
    assert mask[:, 0].tolist() == [False, True, False]
