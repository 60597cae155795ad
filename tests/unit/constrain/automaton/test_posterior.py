"""Canvases given that they are accepted: against every string there is, on small automata."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.cases import for_each
from helpers.chains import (
    FORMS,
    Canvas,
    conditioned,
    enumerate_canvas,
    from_table,
    random_automaton,
    random_canvas,
    read,
    statistics_of,
)
from helpers.frequencies import assert_frequencies

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.record import Posterior, TokenAutomaton

LENGTH = 4
SEEDS = range(80)

pytestmark = pytest.mark.parametrize("form", FORMS)


def chain_of_four() -> TokenAutomaton:
    """States in a row: class 1 stays, class 2 leads on, the last may end."""
    goes = np.array([[-1, 0, 1, -1], [-1, 1, 2, -1], [-1, 2, 3, -1], [-1, -1, -1, 4]])
    accepting = np.array([False, False, False, True])
    return from_table(goes, accepting, np.array([1, 2, 3], dtype=np.int32))


def tokens_of(automaton: TokenAutomaton, canvas: Canvas, classes: torch.Tensor) -> tuple[int, ...]:
    """The best token of each class, the row's best where free."""
    stats, inside = statistics_of(automaton, canvas.probs)
    own = stats.argmax.tolist()
    said = classes.tolist()
    return tuple(own[r] if c < 0 else int(inside.best[r, c]) for r, c in enumerate(said))


def accepts(automaton: TokenAutomaton, canvas: Canvas, tokens: tuple[int, ...]) -> bool:
    behind = read(automaton, canvas.start, tokens[: canvas.rows])[-1]
    return behind >= 0 and int(automaton.distance[behind]) <= canvas.left


def same(one: Posterior, other: Posterior) -> bool:
    return all(
        torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)
    )


@for_each(spread=[1.0, 8.0])
def test_it_is_what_enumeration_says(form: str, spread: float) -> None:
    possible = impossible = 0
    for seed in SEEDS:
        automaton = random_automaton(seed, states=2 + seed % 4)
        canvas = random_canvas(seed, automaton, LENGTH, spread=spread)
        truth = enumerate_canvas(automaton, canvas)
        found = conditioned(automaton, [canvas], form)
        rows = canvas.rows
        if truth.z == 0:
            impossible += 1
            assert float(found.log_z) == -math.inf
            continue
        possible += 1
        assert float(found.log_z) == pytest.approx(math.log(truth.z), abs=1e-5)
        marginal, ended = found.marginal[0].double(), found.ended[0].double()
        torch.testing.assert_close(marginal[:rows], truth.marginal, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ended[:rows], truth.ended, atol=1e-6, rtol=1e-5)
        best = tokens_of(automaton, canvas, found.map_class[0])[:rows]
        weight = float(canvas.probs[range(rows), best].prod())
        assert weight == pytest.approx(truth.best, rel=1e-5)
        assert accepts(automaton, canvas, best)
        assert found.map_state[0, rows - 1] == read(automaton, canvas.start, best)[-1]
        assert tuple(found.sample_class[0, :rows].tolist()) in truth.paths
    assert possible > 40
    assert impossible > 2


def test_rows_behind_the_constrained_ones_are_free(form: str) -> None:
    automaton = random_automaton(1)
    canvas = replace(random_canvas(3, automaton, 6), start=0, rows=2)
    found = conditioned(automaton, [canvas], form)
    assert float(found.log_z) > -math.inf
    assert found.marginal[0, 2:].count_nonzero() == 0
    assert (found.ended[0, 2:] == 1).all()
    assert (found.sample_class[0, 2:] == -1).all()
    assert (found.map_class[0, 2:] == -1).all()
    assert (found.map_state[0, 2:] == found.map_state[0, 1]).all()
    # They weigh nothing: the canvas might as well end there.
    short = replace(canvas, probs=canvas.probs[:2], uniforms=canvas.uniforms[:2])
    assert torch.equal(conditioned(automaton, [short], form).log_z, found.log_z)


@for_each(left=[0, 1, 2, 10])
def test_no_canvas_ends_further_from_a_whole_text_than_the_tokens_left(
    form: str, left: int
) -> None:
    automaton = chain_of_four()
    canvas = random_canvas(0, automaton, 2)
    canvas = replace(canvas, start=0, rows=2, left=left)
    truth = enumerate_canvas(automaton, canvas)
    found = conditioned(automaton, [canvas], form)
    assert (truth.z == 0) == (left == 0)
    assert math.exp(float(found.log_z)) == pytest.approx(truth.z, rel=1e-5)
    if left:
        assert int(automaton.distance[found.map_state[0, -1]]) <= left


@pytest.mark.parametrize("why", ["too far", "nothing to say"])
def test_an_impossible_canvas_is_free_and_says_so(form: str, why: str) -> None:
    automaton = chain_of_four()
    canvas = replace(random_canvas(0, automaton, 4), start=0, rows=2, left=1)
    if why == "too far":
        canvas = replace(canvas, left=0)
    else:
        probs = canvas.probs.clone()
        probs[1, automaton.class_of == 2] = 0.0
        canvas = replace(canvas, probs=probs)
    possible = replace(random_canvas(0, automaton, 4), start=0, rows=2, left=1)
    found = conditioned(automaton, [canvas, possible], form)
    assert float(found.log_z[0]) == -math.inf
    assert float(found.log_z[1]) > -math.inf
    assert found.marginal[0].count_nonzero() == 0
    assert (found.ended[0] == 1).all()
    assert (found.sample_class[0] == -1).all()
    assert (found.map_class[0] == -1).all()
    assert (found.map_state[0] == 0).all()


def test_a_canvas_that_starts_behind_the_end_is_free(form: str) -> None:
    automaton = random_automaton(1)
    canvas = replace(random_canvas(3, automaton, 3), start=automaton.end, rows=3, left=0)
    found = conditioned(automaton, [canvas], form)
    assert float(found.log_z) == 0.0
    assert (found.ended == 1).all()
    assert (found.map_state == automaton.end).all()


@for_each(seed=[20, 22, 23])
def test_samples_come_from_the_joint_distribution(form: str, seed: int) -> None:
    automaton = random_automaton(seed, states=3)
    canvas = replace(random_canvas(seed, automaton, LENGTH, spread=1.0), start=0, rows=3, left=1)
    truth = enumerate_canvas(automaton, canvas)
    assert len(truth.paths) > 6
    draws = torch.Generator().manual_seed(seed)
    batch = [replace(canvas, uniforms=torch.rand(LENGTH, generator=draws)) for _ in range(4000)]
    drawn = conditioned(automaton, batch, form).sample_class[:, :3].tolist()
    names = {path: place for place, path in enumerate(truth.paths)}
    ids = torch.tensor([names[tuple(path)] for path in drawn])
    assert_frequencies(ids, torch.tensor(list(truth.paths.values())))


@for_each(spread=[1.0, 30.0, 200.0])
def test_every_sample_and_every_best_canvas_is_accepted(form: str, spread: float) -> None:
    accepted = 0
    for seed in range(12):
        automaton = random_automaton(seed, states=60, classes=20, vocab=80, density=0.1)
        canvases = [random_canvas(100 * seed + n, automaton, 24, spread=spread) for n in range(8)]
        found = conditioned(automaton, canvases, form)
        for place, canvas in enumerate(canvases):
            if float(found.log_z[place]) == -math.inf:
                continue
            accepted += 1
            for said in (found.sample_class, found.map_class):
                assert accepts(automaton, canvas, tokens_of(automaton, canvas, said[place]))
    assert accepted > 80


def test_equal_canvases_are_settled_by_the_lowest_class(form: str) -> None:
    # Two classes, four ways through two rows, all alike.
    goes = np.array([[-1, 0, 0, 1]])
    automaton = from_table(goes, np.array([True]), np.array([1, 2, 3], dtype=np.int32))
    canvas = Canvas(
        probs=torch.tensor([[0.4, 0.4, 0.2]] * 2, dtype=torch.float64),
        start=0,
        rows=2,
        left=0,
        uniforms=torch.full((2,), 0.5),
    )
    assert conditioned(automaton, [canvas], form).map_class.tolist() == [[1, 1]]


@for_each(uniform=[1e-7, 1 - 2**-24])
def test_the_ends_of_the_unit_interval_draw_what_can_be_drawn(form: str, uniform: float) -> None:
    automaton = random_automaton(4, states=3)
    canvas = replace(random_canvas(4, automaton, 3), start=0, rows=3, left=1)
    canvas = replace(canvas, uniforms=torch.full((3,), uniform))
    path = tuple(conditioned(automaton, [canvas], form).sample_class[0].tolist())
    paths = sorted(enumerate_canvas(automaton, canvas).paths)
    assert path == paths[0 if uniform < 0.5 else -1]


def test_a_canvas_knows_nothing_of_its_batch(form: str) -> None:
    automaton = random_automaton(7, states=40, classes=12, vocab=40, density=0.2)
    canvases = [random_canvas(seed, automaton, 19, spread=4.0) for seed in range(9)]
    whole = conditioned(automaton, canvases, form)
    for place, canvas in enumerate(canvases):
        alone = conditioned(automaton, [canvas], form)
        mine = replace(
            whole,
            **{
                field.name: getattr(whole, field.name)[place : place + 1] for field in fields(whole)
            },
        )
        assert same(alone, mine), place


def test_costs_at_different_rows_do_not_drown_one_another(form: str) -> None:
    """Two ways, equally likely in the end, thousands of nats apart in the middle."""
    goes = np.array([[-1, -1, 1, 2, -1], [-1, -1, 1, -1, 3], [-1, -1, -1, 2, 3]])
    accepting = np.array([False, True, True])
    automaton = from_table(goes, accepting, np.array([1, 2, 3, 4], dtype=np.int32))
    # By class 2 into a state that reads nothing else, by class 3 into another.
    length, price = 128, 60.0
    log_prob = torch.full((length, 4), -2000.0, dtype=torch.float64)
    half = length // 2
    log_prob[:half, 1], log_prob[half:, 1] = -price, 0.0
    log_prob[:half, 2], log_prob[half:, 2] = 0.0, -price
    canvas = Canvas(
        probs=log_prob.exp(), start=0, rows=length, left=0, uniforms=torch.full((length,), 0.3)
    )
    found = conditioned(automaton, [canvas], form)
    assert float(found.log_z) == pytest.approx(math.log(2) - half * price, rel=1e-7)
    for place, share in ((2, 0.5), (3, 0.5)):
        expected = torch.full((length,), share)
        torch.testing.assert_close(found.marginal[0, :, place], expected, atol=1e-5, rtol=0)
