"""``advance`` against the published loop body, canvas by canvas and token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from helpers.table_model import CONSTANTS, LENGTH, SLOTS, Engine, TableModel, Trace, published

from vllm_diffusion.denoise.accept import DRIFT

if TYPE_CHECKING:
    from vllm_diffusion.records import Emission


def assert_same_canvas(ours: Trace, emission: Emission, theirs: Trace, width: int) -> None:
    assert ours.steps == theirs.steps
    # The input after the last step differs by design: ours is the finished canvas, to be committed.
    assert ours.canvases[:-1] == theirs.canvases[:-1]
    assert ours.argmax == theirs.argmax
    assert ours.canvases[-1] == theirs.argmax[-1]
    assert emission.tokens[0, :width].tolist() == theirs.argmax[-1]
    assert emission.count[0] == width
    assert emission.steps[0] == theirs.steps


@for_each(stability=[0, 1, 2, 3])
@pytest.mark.parametrize(("sharpness", "seeds"), [(0.0, 1), (1.0, 4), (3.0, 4)])
def test_three_canvases_equal_the_published_loop(
    stability: int, sharpness: float, seeds: int
) -> None:
    rule = replace(CONSTANTS, stability_threshold=stability)
    lengths = set()
    for seed in range(seeds):
        model = TableModel(seed=seed, sharpness=sharpness)
        engine = Engine(model, rule)
        engine.admit(2, seed=seed, start=5)
        for canvas in range(3):
            theirs = published(model, seed, 5 + canvas * LENGTH, LENGTH, rule)
            ours, emission = engine.run_canvas(2)
            assert_same_canvas(ours, emission, theirs, LENGTH)
            lengths.add(theirs.steps)
    if sharpness == 0.0:
        assert lengths == {CONSTANTS.max_steps}, "a model that stays unsure runs out of steps"
    else:
        assert len(lengths) > 1, "every canvas stopped at the same step: the stop was not tested"


@for_each(stability=[0, 1, 3])
def test_an_engine_that_remembers_more_steps_than_a_rule_reads_follows_it(stability: int) -> None:
    rule = replace(CONSTANTS, stability_threshold=stability)
    lengths = set()
    for seed in range(4):
        model = TableModel(seed=seed, sharpness=3.0)
        engine = Engine(model, rule, remembered=4)
        engine.admit(0, seed=seed, start=0)
        theirs = published(model, seed, 0, LENGTH, rule)
        ours, emission = engine.run_canvas(0)
        assert_same_canvas(ours, emission, theirs, LENGTH)
        lengths.add(theirs.steps)
    assert min(lengths) < rule.max_steps, "every canvas ran out of steps: the stop was not tested"


@for_each(bound=[1e-4, 0.5, 20.0])
def test_other_entropy_bounds_equal_the_published_loop(bound: float) -> None:
    rule = replace(CONSTANTS, entropy_bound=bound)
    for seed in range(5):
        model = TableModel(seed=seed, sharpness=0.5)
        engine = Engine(model, rule)
        engine.admit(0, seed=seed, start=0)
        ours, emission = engine.run_canvas(0)
        assert_same_canvas(ours, emission, published(model, seed, 0, LENGTH, rule), LENGTH)


@pytest.mark.parametrize("doubt", [0.5, 4.0])
def test_a_canvas_that_is_sure_at_once_ends_on_the_published_trajectory(doubt: float) -> None:
    saved = 0
    for seed in range(6):
        model = TableModel(seed=seed, sharpness=3.0)
        engine = Engine(model, replace(CONSTANTS, doubt_threshold=doubt))
        engine.admit(0, seed=seed, start=0)
        ours, emission = engine.run_canvas(0)
        theirs = published(model, seed, 0, LENGTH, CONSTANTS)
        assert ours.argmax == theirs.argmax[: ours.steps]
        assert emission.tokens[0].tolist() == theirs.argmax[ours.steps - 1]
        saved += theirs.steps - ours.steps
    assert saved > 0, "no canvas was sure at once"


@for_each(hold=[0.5, 0.9])
def test_what_held_is_the_next_input_beside_what_the_bound_accepts(hold: float) -> None:
    added = 0
    rule = replace(CONSTANTS, entropy_bound=0.0)
    for seed in range(8):
        model = TableModel(seed=seed, sharpness=3.0)
        engine, plain = Engine(model, replace(rule, hold_threshold=hold)), Engine(model, rule)
        for each in (engine, plain):
            each.admit(0, seed=seed, start=0)
        now, then = engine.pool, plain.pool
        # The canvases are the same until the first token is held.
        while torch.equal(now.tokens, then.tokens) and not bool(now.causal[0]):
            argmax, top_prob = now.argmax[0].clone(), now.top_prob[0].clone()
            engine.step(0)
            plain.step(0)
        held = (now.argmax[0] == argmax) & (now.top_prob[0] >= hold)
        held &= ((now.top_prob[0] - top_prob).abs() <= DRIFT) & (top_prob > 0)
        differs = now.tokens[0] != then.tokens[0]
        assert not bool((differs & ~held).any())
        assert torch.equal(now.tokens[0][differs], now.argmax[0][differs])
        added += int(differs.sum())
    assert added > 0, "the bound had accepted all that held"


def test_a_new_canvas_remembers_no_belief_of_the_last_one() -> None:
    # Everything is sure at once, and holds: the second canvas must not know it from the first.
    rule = replace(CONSTANTS, doubt_threshold=1e-3, hold_threshold=0.01)
    model = TableModel(sharpness=0.7)
    engine = Engine(model, rule)
    engine.admit(0, seed=3, start=20)
    engine.run_canvas(0)
    assert not bool(engine.pool.top_prob[0].any())
    second, _ = engine.run_canvas(0)
    fresh = Engine(model, rule)
    fresh.admit(0, seed=3, start=20 + LENGTH)
    alone, _ = fresh.run_canvas(0)
    assert second == alone


@for_each(width=[1, 2, 7, LENGTH - 1])
def test_a_narrow_canvas_equals_the_published_loop_at_that_length(width: int) -> None:
    for seed in range(5):
        model = TableModel(seed=seed, sharpness=0.8)
        engine = Engine(model)
        engine.admit(1, seed=seed, start=40, width=width)
        ours, emission = engine.run_canvas(1)
        assert_same_canvas(ours, emission, published(model, seed, 40, width, CONSTANTS), width)


def test_a_canvas_runs_the_same_alone_and_among_others() -> None:
    model = TableModel(sharpness=0.7)

    def crowd() -> Engine:
        engine = Engine(model)
        for slot in range(SLOTS):
            engine.admit(slot, seed=100 + slot, start=7 * slot, width=LENGTH - slot)
        return engine

    for slot in range(0, SLOTS, 2):
        alone = crowd()
        mixed = crowd()
        others = [other for other in range(SLOTS) if other != slot]
        # Uneven company: some are steps ahead, so denoise, finish and commit share a batch.
        for other in others:
            mixed.step(*others[: 1 + other % 3])
        for _ in range(2):
            ours, emission = alone.run_canvas(slot)
            again, emission_again = mixed.run_canvas(slot, *others)
            assert ours == again
            width = LENGTH - slot
            assert torch.equal(emission.tokens[0, :width], emission_again.tokens[0, :width])


def test_order_in_the_batch_does_not_matter() -> None:
    traces = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        engine = Engine(TableModel(sharpness=0.7))
        for slot in range(4):
            engine.admit(slot, seed=slot, start=slot)
        for _ in range(10):
            engine.step(*order)
        traces.append(engine.pool.tokens[:4].tolist())
    assert traces[0] == traces[1]


def test_a_preempted_canvas_starts_again_and_ends_the_same() -> None:
    engine = Engine(TableModel(sharpness=0.7))
    engine.admit(0, seed=3, start=20)
    for _ in range(3):
        engine.step(0)
    # Preemption loses the slot; the request comes back elsewhere with its text as its prompt.
    engine.admit(4, seed=3, start=20)
    undisturbed = Engine(TableModel(sharpness=0.7))
    undisturbed.admit(0, seed=3, start=20)
    ours, emission = engine.run_canvas(4)
    expected, expected_emission = undisturbed.run_canvas(0)
    assert ours == expected
    assert torch.equal(emission.tokens, expected_emission.tokens)


def test_the_step_limit_of_a_request_ends_its_canvas() -> None:
    engine = Engine(TableModel(sharpness=0.0))
    engine.admit(0, seed=1, start=0)
    engine.admit(1, seed=1, start=0)
    engine.pool.constants.max_steps[1] = 4
    ours, emission = engine.run_canvas(1)
    assert ours.steps == 4
    assert int(emission.steps[0]) == 4
    longer, _ = engine.run_canvas(0)
    assert longer.steps == CONSTANTS.max_steps


def test_the_temperature_reaches_the_head() -> None:
    engine = Engine(TableModel())
    seen = engine.watch_head()
    engine.admit(0, seed=(9 << 32) + 4, start=30)
    engine.admit(1, seed=8, start=50)
    engine.step(1)
    engine.step(0, 1)
    rows, noise = seen[1], seen[1].noise
    assert rows.rewrite is None
    first, second = 0.8, 0.4 + 0.4 * 11 / 12
    assert rows.temperature.tolist() == pytest.approx([first] * LENGTH + [second] * LENGTH)
    assert noise.seed.tolist() == [[4, 9]] * LENGTH + [[8, 0]] * LENGTH
    assert noise.position.tolist() == [*range(30, 30 + LENGTH), *range(50, 50 + LENGTH)]
    assert noise.step.tolist() == [0] * LENGTH + [1] * LENGTH


def test_the_head_sees_no_commit_row_and_none_beyond_a_canvas() -> None:
    engine = Engine(TableModel())
    seen = engine.watch_head()
    for slot in range(3):
        engine.admit(slot, seed=slot, start=20, width=LENGTH - slot)
    engine.step(0, 1, 2)
    engine.pool.causal[1] = True
    engine.step(0, 1, 2)
    engine.pool.causal[:] = True
    engine.step(0, 1, 2)  # nothing to compute, so no head
    assert [len(rows) for rows in seen] == [3 * LENGTH - 3, 2 * LENGTH - 2]
