"""``advance`` where a request changes the distribution: bad words, greedy, temperature, pins."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.cases import for_each
from helpers.table_model import (
    CONSTANTS,
    LENGTH,
    NOTHING,
    VOCAB,
    Engine,
    TableModel,
    Trace,
)

from vllm_diffusion.constrain.constraints import Constraints
from vllm_diffusion.denoise.renoise import uniform_tokens
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.records import Emission, StopReason


def committed(
    constraints: Constraints, seed: int, canvases: int = 2, sharpness: float = 0.7
) -> list[int]:
    """The output of a request, alone."""
    engine = Engine(TableModel(seed=seed, sharpness=sharpness))
    engine.admit(1, seed=seed, start=9, constraints=constraints)
    for _ in range(canvases):
        engine.run_canvas(1)
    return engine.text[1, 9 : engine.start[1]].tolist()


def pairs(tokens: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(tokens))


@for_each(sharpness=[0.0, 0.7])
def test_no_bad_word_is_committed(sharpness: float) -> None:
    for seed in range(6):
        plain = committed(NOTHING, seed, sharpness=sharpness)
        # Every pair of what would be said is bad.
        words = tuple(pairs(plain))
        rewritten = committed(Constraints(bad_words=words), seed, sharpness=sharpness)
        assert not set(pairs(rewritten)) & set(words)
        assert len(rewritten) == len(plain)


def test_a_bad_word_may_not_lie_across_two_canvases_either() -> None:
    for seed in range(4):
        plain = committed(NOTHING, seed)
        word = (plain[LENGTH - 1], plain[LENGTH])
        rewritten = committed(Constraints(bad_words=(word,)), seed)
        assert word not in pairs(rewritten)
        assert rewritten[:LENGTH] == plain[:LENGTH]


def test_a_canvas_of_one_step_is_repaired() -> None:
    # No step before it: nothing but the repair can have kept the words out.
    engine = Engine(TableModel(sharpness=0.0))
    for slot in (0, 1):
        words = tuple(pairs(engine.text[0, 9:25].tolist())) if slot else ()
        engine.admit(slot, seed=4, start=9, constraints=Constraints(bad_words=words))
        engine.pool.constants.max_steps[slot] = 1
        engine.run_canvas(slot)
    plain, rewritten = engine.text[0, 9:25].tolist(), engine.text[1, 9:25].tolist()
    assert not set(pairs(plain)) & set(pairs(rewritten))
    # One of two neighbours had to change, no more.
    changed = [a != b for a, b in zip(plain, rewritten, strict=True)]
    assert not any(both == (True, True) for both in itertools.pairwise(changed))


def test_a_settled_canvas_with_a_bad_word_goes_on() -> None:
    model = TableModel(sharpness=3.0)
    engine = Engine(model)
    engine.admit(0, seed=1, start=5)
    plain, _ = engine.run_canvas(0)
    word = tuple(plain.argmax[-1][3:5])
    again = Engine(model)
    again.admit(0, seed=1, start=5, constraints=Constraints(bad_words=(word,)))
    ours, emission = again.run_canvas(0)
    assert word not in pairs(emission.tokens[0].tolist())
    assert plain.steps < CONSTANTS.max_steps
    assert ours.argmax[-1] == ours.argmax[-2], "it settled, rather than ran out of steps"
    assert emission.reason.tolist() == [StopReason.SETTLED]


@pytest.mark.parametrize(
    ("limit", "bad_word", "reason"),
    [
        (0, False, StopReason.SETTLED),
        (0, True, StopReason.STEPS),
        (-1, False, StopReason.STEPS),
    ],
    ids=["settles in its last step", "but says a bad word", "one step too few"],
)
def test_a_canvas_says_why_it_stopped(limit: int, bad_word: bool, reason: StopReason) -> None:
    def run(constraints: Constraints, max_steps: int) -> tuple[Trace, Emission]:
        engine = Engine(TableModel(sharpness=3.0))
        engine.admit(0, seed=1, start=5, constraints=constraints)
        # The ramp follows the limit: only a flat one leaves the steps before it as they were.
        engine.pool.constants.max_steps[0], engine.pool.constants.t_min[0] = (
            max_steps,
            CONSTANTS.t_max,
        )
        return engine.run_canvas(0)

    plain, _ = run(NOTHING, CONSTANTS.max_steps)
    assert plain.steps < CONSTANTS.max_steps, "it must settle by itself"
    words = (tuple(plain.argmax[-1][3:5]),) if bad_word else ()
    limited, emission = run(Constraints(bad_words=words), plain.steps + limit)
    assert limited.steps == plain.steps + limit
    assert emission.reason.tolist() == [reason]


def test_greedy_input_holds_the_argmax_where_accepted() -> None:
    model = TableModel(sharpness=0.7)
    engine, sampled = Engine(model), Engine(model)
    engine.admit(0, seed=3, start=20, constraints=Constraints(temperature=0.0))
    sampled.admit(0, seed=3, start=20)
    ours, _ = engine.run_canvas(0)
    theirs, _ = sampled.run_canvas(0)
    noise = [
        uniform_tokens(
            torch.tensor([split_seed(3)]),
            20 + torch.arange(LENGTH)[None],
            torch.tensor([step]),
            VOCAB,
        )[0].tolist()
        for step in range(ours.steps)
    ]
    for trace, greedy in ((ours, True), (theirs, False)):
        # The input after a step is the step's argmax or the step's noise, and nothing else.
        foreign = [
            (step, at)
            for step in range(min(trace.steps, len(noise)) - 1)
            for at in range(LENGTH)
            if trace.canvases[step + 1][at] not in (trace.argmax[step][at], noise[step][at])
        ]
        assert (not foreign) == greedy
    assert ours.argmax[0] == theirs.argmax[0], "the first argmax depends on no sample"


def test_the_temperature_of_a_request_scales_the_schedule() -> None:
    engine = Engine(TableModel())
    seen = engine.watch_head()
    for slot, temperature in enumerate((1.0, 0.5, 0.0)):
        engine.admit(slot, seed=1, start=5, constraints=Constraints(temperature=temperature))
    engine.step(0, 1, 2)
    engine.step(0, 1, 2)
    second = 0.4 + 0.4 * 11 / 12
    first_step, second_step = (rows.temperature.view(-1, LENGTH)[:, 0].tolist() for rows in seen)
    assert first_step == pytest.approx([0.8, 0.4, 0.8])
    assert second_step == pytest.approx([second, second / 2, second])


def test_pins_are_in_the_output_and_not_in_the_next_canvas() -> None:
    for seed in range(3):
        plain = committed(NOTHING, seed)
        given = tuple((token + 30) % VOCAB for token in plain[:LENGTH])
        pins = (0, 3, LENGTH - 1)
        pinned = committed(Constraints(seed_canvas=given, pinned=pins), seed)
        assert [pinned[at] for at in pins] == [given[at] for at in pins]
        assert [pinned[LENGTH + at] for at in pins] != [given[at] for at in pins]
        free = [at for at in range(LENGTH) if at not in pins]
        assert [pinned[at] for at in free] != [given[at] for at in free]


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(temperature=0.4, top_k=9, min_p=0.01, top_p=0.95),
        Constraints(bias=((3, 4.0), (4, -9.0)), repetition=1.3, frequency=0.3, presence=0.4),
        Constraints(allowed=tuple(range(20)), early=((5, 9),), bad_words=((3, 4), (7,))),
        Constraints(temperature=0.0, seed_canvas=(9,) * LENGTH, pinned=(2, 7)),
    ],
    ids=["truncated", "penalised", "masked", "greedy and pinned"],
)
def test_a_rewritten_canvas_runs_the_same_alone_and_among_others(constraints: Constraints) -> None:
    model = TableModel(sharpness=0.7)
    alone, mixed = Engine(model), Engine(model)
    alone.admit(0, seed=8, start=11, constraints=constraints)
    mixed.admit(0, seed=8, start=11, constraints=constraints)
    mixed.admit(1, seed=9, start=3, constraints=Constraints(top_k=3, allowed=(1, 2, 3)))
    mixed.admit(2, seed=9, start=3)
    mixed.admit(
        3, seed=9, start=3, constraints=Constraints(bad_words=((1, 2, 3, 4),), presence=1.0)
    )
    untouched = Engine(model)
    untouched.admit(2, seed=9, start=3)
    mixed.step(1, 2, 3)
    for _ in range(2):
        ours, emission = alone.run_canvas(0)
        again, emission_again = mixed.run_canvas(0, 3, 2, 1)
        assert ours == again
        assert torch.equal(emission.tokens[0], emission_again.tokens[0])
    while untouched.start[2] < mixed.start[2]:
        untouched.step(2)
    assert torch.equal(untouched.text[2], mixed.text[2])
    assert mixed.start[2] > 3
