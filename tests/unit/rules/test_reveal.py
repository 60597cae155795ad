"""``advance`` under ``reveal`` on a model that is a table, against a loop in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from helpers.cases import for_each
from helpers.frequencies import assert_frequencies
from helpers.reveal_model import (
    FAMILIES,
    GRID,
    LENGTH,
    MASK,
    ONE_A_STEP,
    SLOTS,
    VOCAB,
    WHOLE,
    Asked,
    Engine,
    head_of,
    logits_of,
    pool_of,
    random_request,
    truth,
)

from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.denoise.constants import REVEAL_BY
from vllm_diffusion.denoise.noise import AbsorbingNoise, UniformNoise
from vllm_diffusion.records import CanvasBatch, CanvasStats, StopReason
from vllm_diffusion.rules.reveal import Reveal
from vllm_diffusion.step import advance


@for_each(seed=range(40), name=FAMILIES)
def test_canvases_of_a_mixed_batch_equal_the_loop(seed: int, name: str) -> None:
    rng, family = random.Random(seed), FAMILIES[name]
    asked = {slot: random_request(rng, slot) for slot in range(rng.randint(1, SLOTS))}
    found = Engine(family, asked).run()
    for slot, each in asked.items():
        assert found[slot] == truth(each, family), each


@for_each(by=REVEAL_BY, name=FAMILIES, greedy=[True, False])
def test_every_score_reveals_one_position_a_step(by: str, name: str, greedy: bool) -> None:
    asked = Asked(replace(ONE_A_STEP, reveal_by=by), seed=3, start=20, greedy=greedy)
    family = FAMILIES[name]
    went, tokens, steps, reason = Engine(family, {2: asked}).run()[2]
    assert (went, tokens, steps, reason) == truth(asked, family)
    assert (steps, reason) == (LENGTH, StopReason.STEPS)
    assert sorted(at for [at] in went.revealed) == list(range(LENGTH))
    if by == "leftmost":
        assert went.revealed == [[at] for at in range(LENGTH)]


def test_the_orders_differ() -> None:
    orders = {
        by: str(
            Engine(GRID, {0: Asked(replace(ONE_A_STEP, reveal_by=by), 3, 20, temperature=1.7)})
            .run()[0][0]
            .revealed
        )
        for by in REVEAL_BY
    }
    assert len(set(orders.values())) == len(REVEAL_BY)


@for_each(width=[1, 3, 7])
def test_a_short_canvas_of_a_grid_keeps_the_blocks_schedule(width: int) -> None:
    constants = replace(ONE_A_STEP, max_steps=2)
    asked = Asked(constants, seed=1, start=8 - width, width=width)
    went, *_ = Engine(GRID, {0: asked}).run()[0]
    assert [len(places) for places in went.revealed] == ([4, width - 4] if width > 4 else [width])


def test_a_revealed_token_never_changes_and_no_mask_is_ever_said() -> None:
    for seed in range(20):
        asked = random_request(random.Random(seed), 0)
        went, tokens, *_ = Engine(WHOLE, {0: asked}).run()[0]
        assert MASK not in tokens
        for before, after in zip(went.tokens, went.tokens[1:], strict=False):
            assert all(new == old for old, new in zip(before, after, strict=True) if old != MASK)


def test_given_text_is_closed_from_the_first_step_on() -> None:
    given = (-1, 33, -1, -1, 12, -1, 40, 9)
    for family in (GRID, WHOLE):
        asked = Asked(ONE_A_STEP, seed=1, start=8, given=given)
        engine = Engine(family, {0: asked})
        assert torch.equal(engine.pool.argmax, engine.pool.tokens)
        went, tokens, steps, reason = engine.run()[0]
        assert [at for [at] in went.revealed] == sorted(
            (0, 2, 3, 5), key=lambda at: went.revealed.index([at])
        )
        assert (steps, reason) == (4, StopReason.SETTLED)
        assert all(said == asked for said, asked in zip(tokens, given, strict=True) if asked >= 0)


def test_a_canvas_that_is_given_whole_ends_at_once() -> None:
    given = tuple(range(10, 10 + LENGTH))
    went, tokens, steps, _ = Engine(GRID, {0: Asked(ONE_A_STEP, 1, 8, given=given)}).run()[0]
    assert (went.revealed, tuple(tokens), steps) == ([[]], given, 1)


def test_the_next_canvas_begins_open() -> None:
    for fused in (False, True):
        asked = Asked(replace(ONE_A_STEP, max_steps=1), seed=1, start=16, fused=fused)
        engine = Engine(GRID, {3: asked})
        first = engine.run()[3][1]
        assert engine.pool.tokens[3].tolist() == [MASK] * LENGTH
        assert engine.start[3] == 16 + LENGTH
        second = engine.run()[3]
        assert second[1] == truth(replace(asked, start=16 + LENGTH), GRID)[1] != first


def test_a_waiting_canvas_holds_what_it_commits() -> None:
    engine = Engine(GRID, {1: Asked(replace(ONE_A_STEP, max_steps=1), seed=1, start=16)})
    emission = engine.step(1)
    assert int(emission.count[0]) == 0
    assert bool(engine.pool.causal[1])
    said = engine.pool.tokens[1].tolist()
    assert MASK not in said
    assert engine.step(1).tokens[0].tolist() == said


def test_a_canvas_ends_behind_an_end_that_nothing_open_stands_before() -> None:
    whole = Asked(replace(ONE_A_STEP, reveal_by="leftmost"), seed=5, start=24, temperature=2.0)
    _, plain, *_ = Engine(GRID, {0: whole}).run()[0]
    assert len(set(plain)) > 4
    for at, token in enumerate(plain):
        for fused in (False, True):
            asked = replace(whole, ends=(9, token), fused=fused)
            engine = Engine(GRID, {0: asked})
            _, tokens, steps, reason = engine.run()[0]
            first = next(place for place, said in enumerate(plain) if said in asked.ends)
            assert (tokens, steps) == (plain[: first + 1], first + 1), at
            assert reason == (StopReason.STEPS if first == LENGTH - 1 else StopReason.SETTLED)
            # The next canvas begins behind it, as open as any.
            assert engine.start[0] == 24 + first + 1
            assert engine.pool.tokens[0].tolist() == [MASK] * LENGTH


def test_an_end_behind_an_open_position_ends_nothing_yet() -> None:
    given = (-1, 33, -1, -1, -1, -1, -1, -1)
    asked = Asked(replace(ONE_A_STEP, reveal_by="leftmost"), 1, 8, given=given, ends=(33,))
    engine = Engine(GRID, {0: asked})
    assert not bool(engine.pool.causal[0])
    _, tokens, steps, _ = engine.run()[0]
    assert (len(tokens), tokens[1], steps) == (2, 33, 1)
    asked = replace(asked, constants=replace(asked.constants, reveal_by="margin"))
    went, *_ = Engine(GRID, {0: asked}).run()[0]
    (last,) = went.revealed[-1]
    assert last == 0, "it ends as soon as the first position is known"


def test_the_next_owner_of_a_slot_has_ends_of_its_own() -> None:
    pool = pool_of()
    pool.admit(0, seed=1, ends=(3, 4, 5, 6, 8, 9))
    assert pool.ends is not None
    assert pool.ends[0].tolist() == [3, 4, 5, 6]
    pool.admit(0, seed=1, ends=(9,))
    assert pool.ends[0].tolist() == [9, -1, -1, -1]
    pool.admit(0, seed=1)
    assert pool.ends[0].tolist() == [-1] * 4


def test_a_row_that_is_not_a_number_says_no_mask() -> None:
    for mask, said in ((MASK, 0), (0, 1)):
        pool = pool_of()
        pool.noise = AbsorbingNoise(mask)
        pool.admit(0, seed=1)
        batch = CanvasBatch(
            slots=torch.tensor([0]),
            width=torch.tensor([LENGTH]),
            position=torch.arange(LENGTH)[None],
            valid=torch.ones(1, LENGTH, dtype=torch.bool),
        )
        pool.begin(batch.slots, batch.position)
        stats = CanvasStats.zeros(
            torch.zeros(LENGTH, 1), self_conditioning=False, own_prob=True
        ).reshape(1, LENGTH)
        stats = replace(
            stats,
            sample=torch.full((1, LENGTH), mask),
            own_prob=torch.full((1, LENGTH), torch.nan),
        )
        decision = Reveal(AbsorbingNoise(mask), block=LENGTH).decide(pool, batch, stats)
        assert decision.accept[0].tolist() == [True] + [False] * (LENGTH - 1)
        assert decision.next_tokens[0].tolist() == [said] + [mask] * (LENGTH - 1)


def test_only_the_probabilities_that_some_request_needs_are_asked_for() -> None:
    pool, rule = pool_of(), Reveal(AbsorbingNoise(MASK))
    assert rule.probabilities(pool) == (False, False)
    for slot, by in enumerate(("entropy", "drawn", "model")):
        pool.admit(slot, seed=1, constants=replace(ONE_A_STEP, reveal_by=by))
    assert rule.probabilities(pool) == (True, True)
    pool.release(1)
    assert rule.probabilities(pool) == (False, True)


def test_no_canvas_that_did_not_run_reveals_anything() -> None:
    engine = Engine(GRID, {0: Asked(ONE_A_STEP, 1, 8), 1: Asked(ONE_A_STEP, 2, 8)})
    stats = CanvasStats.zeros(torch.zeros(2 * LENGTH, 1), own_prob=True).reshape(2, LENGTH)
    batch = CanvasBatch(
        slots=torch.tensor([0, 1]),
        width=torch.full((2,), LENGTH),
        position=(8 + torch.arange(LENGTH)).expand(2, LENGTH),
        valid=torch.ones(2, LENGTH, dtype=torch.bool),
        idle=torch.tensor([True, False]),
    )
    decision = engine.rule.decide(engine.pool, batch, stats)
    emission = engine.pool.apply(batch, stats, decision)
    assert emission.revealed is not None
    assert emission.revealed.any(dim=1).tolist() == [False, True]


def test_only_masks_can_be_revealed() -> None:
    with pytest.raises(AssertionError, match="only masks"):
        Reveal(UniformNoise(VOCAB))


@for_each(temperature=[0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_the_model_and_the_request_say(temperature: float) -> None:
    slots, length = 1500, 4
    constants = replace(ONE_A_STEP, max_steps=1)
    pool = pool_of(constants, slots, length)
    for slot in range(slots):
        pool.admit(slot, seed=slot)
    batch = CanvasBatch(
        slots=torch.arange(slots),
        width=torch.full((slots,), length),
        position=torch.arange(length).expand(slots, length),
        valid=torch.ones(slots, length, dtype=torch.bool),
    )
    pool.begin(batch.slots, batch.position)
    logits = logits_of(torch.full((length,), MASK), 0)
    rewrite = Rewrite(
        canvas=torch.arange(slots).repeat_interleave(length),
        temperature=torch.full((slots,), temperature),
    )
    hidden = logits.expand(slots, length, VOCAB)
    rule = Reveal(pool.noise, block=length)
    advance(pool, batch, hidden, head_of(4096), rule, rewrite=rewrite)
    logits[:, MASK] = -math.inf
    for at in range(length):
        assert_frequencies(pool.tokens[:, at], (logits[at] / temperature).softmax(-1))
