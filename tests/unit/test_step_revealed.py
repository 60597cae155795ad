"""``advance`` where noise is masks and requests ask for something: what is revealed stays."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import count, product
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.absorbing import (
    BLOCK,
    GRID,
    MASK,
    NOTHING,
    PUBLISHED,
    SDAR,
    SLOTS,
    VOCAB,
    Engine,
    any_rule,
    greedy,
)
from helpers.cases import for_each
from helpers.chains import FAR, enumerate_canvas, random_automaton, random_canvas, read
from helpers.frequencies import assert_frequencies

from vllm_diffusion.constrain.constraints import Constraints
from vllm_diffusion.denoise.constants import RevealConstants

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

EITHER = pytest.mark.parametrize("family", list(PUBLISHED))


# ---- known rows ----


@EITHER
def test_what_the_model_says_of_revealed_rows_is_never_read(family: str) -> None:
    engine = Engine(*PUBLISHED[family], sharpness=3.0)
    engine.admit(seed=1, start=3)
    engine.run(40)
    for stats, _ in engine.decisions:
        for name in ("entropy", "top_prob", "margin", "sample_prob", "own_prob"):
            values = getattr(stats, name)
            assert values is None or bool(values.isfinite().all()), name


def test_a_known_row_is_certain_of_its_token() -> None:
    engine = Engine(GRID, SDAR)
    engine.admit(start=8, seed=3)
    known = [-1] * BLOCK
    for _ in range(BLOCK):
        engine.step(0)
        stats, decision = engine.decisions[-1]
        for at, token in enumerate(known):
            if token >= 0:
                assert int(stats.argmax[0, at]) == int(stats.sample[0, at]) == token
                assert float(stats.entropy[0, at]) == 0
                assert float(stats.top_prob[0, at]) == float(stats.margin[0, at]) == 1
                assert float(stats.sample_prob[0, at]) == 1
                assert not bool(decision.accept[0, at])
        if bool(decision.finished[0]):
            break
        known = [-1 if token == MASK else token for token in engine.pool.tokens[0].tolist()]
    assert -1 not in decision.next_tokens[0].tolist()


# ---- automata ----


def automata() -> list[TokenAutomaton]:
    """Some that have something to say, over the model's ids; none reads the mask."""
    made = []
    for seed in count():
        each = random_automaton(seed, states=6, classes=5, vocab=VOCAB)
        each.class_of[MASK] = 0
        # A class that lost its only token would be a promise that nobody can keep.
        classes = set(each.class_of.tolist()) - {0}
        if each.distance[each.start] < FAR and classes == set(range(1, each.num_classes)):
            made.append(each)
        if len(made) == 6:
            return made
    raise AssertionError


AUTOMATA = automata()


@EITHER
@for_each(seed=range(40))
def test_whatever_is_revealed_when_the_text_is_accepted(family: str, seed: int) -> None:
    rng = random.Random(seed)
    automaton = rng.choice(AUTOMATA)
    budget, start = rng.randrange(8, 30), rng.randrange(1, 12)
    engine = Engine(
        PUBLISHED[family][0], any_rule(seed), seed=seed, sharpness=rng.choice([0, 1, 9])
    )
    asked = Constraints(temperature=rng.choice([0.0, 0.7, 1.0]), top_k=rng.choice([0, 1, 5]))
    engine.admit(
        seed=seed,
        start=start,
        constraints=asked,
        automaton=automaton,
        budget=budget,
        fused=rng.random() < 0.5,
    )
    said = engine.run(budget)
    states = read(automaton, automaton.start, said)
    assert states[-1] >= 0, said
    assert automaton.accepting[states[-1]]
    assert MASK not in said


SMALL = replace(GRID, block=4)


def small_automata() -> list[tuple[int, TokenAutomaton]]:
    """Seeds and automata over six ids, two of which, the mask among them, no state reads."""
    made = []
    for seed in count():
        each = random_automaton(seed, vocab=6)
        each.class_of[MASK] = 0
        canvas = replace(random_canvas(seed, each, 4, spread=1.0), start=each.start, rows=4, left=1)
        canvas.probs[:, MASK] = 0
        if len(enumerate_canvas(each, canvas).paths) > 5:
            made.append((seed, each))
        if len(made) == 3:
            return made
    raise AssertionError


def enumerated(automaton: TokenAutomaton, probs: Tensor, left: int) -> dict[tuple[int, ...], float]:
    """The probability of every canvas [4] that is accepted, given that one is."""
    found = {}
    for tokens in product(range(probs.shape[1]), repeat=len(probs)):
        state = read(automaton, automaton.start, tokens)[-1]
        if state >= 0 and automaton.distance[state] <= left:
            weight = math.prod(float(probs[row, token]) for row, token in enumerate(tokens))
            if weight > 0:
                found[tokens] = weight
    total = sum(found.values())
    return {tokens: weight / total for tokens, weight in found.items()}


@for_each(which=range(3))
def test_one_step_draws_the_canvas_from_the_joint_distribution(which: int) -> None:
    seed, automaton = small_automata()[which]
    rule = RevealConstants(max_steps=1, reveal_threshold=0.0, reveal_by="drawn")
    engine = Engine(SMALL, rule, seed=seed, vocab=6)
    logits = engine.logits(torch.full((4,), MASK), start=4)
    logits[:, MASK] = -torch.inf
    truth = enumerated(automaton, logits.double().softmax(dim=1), left=1)
    index = {tokens: at for at, tokens in enumerate(truth)}
    drawn = []
    for number in range(250):
        for slot in range(SLOTS):
            key = number * SLOTS + slot
            engine.admit(slot, seed=key, start=4, automaton=automaton, budget=5, fused=True)
        engine.step(*range(SLOTS))
        drawn += [index[tuple(engine.said(slot))] for slot in range(SLOTS)]
    assert_frequencies(torch.tensor(drawn), torch.tensor([*truth.values()]))


@for_each(which=range(3))
def test_a_greedy_canvas_is_the_most_likely_one_and_its_scores_are_marginals(which: int) -> None:
    seed, automaton = small_automata()[which]
    for by in ("drawn", "model"):
        rule = RevealConstants(max_steps=4, reveal_threshold=0.0, reveal_by=by)
        for asked in (greedy(), NOTHING):
            engine = Engine(SMALL, rule, seed=seed, vocab=6)
            engine.admit(start=4, constraints=asked, automaton=automaton, budget=5)
            for _ in range(4):
                tokens = engine.pool.tokens[0].clone()
                logits = engine.logits(tokens, start=4).double()
                logits[:, MASK] = -torch.inf
                probs = logits.softmax(dim=1)
                given = torch.nn.functional.one_hot(tokens, 6).double()
                held = torch.where((tokens == MASK)[:, None], probs, given)
                truth = enumerated(automaton, held, left=1)
                engine.step(0)
                stats, decision = engine.decisions[-1]
                assert int(decision.accept.sum()) == 1
                best = max(truth.values())
                assert truth[tuple(stats.argmax[0].tolist())] == pytest.approx(best, rel=1e-5)
                if asked is not NOTHING:
                    assert torch.equal(stats.sample, stats.argmax)
                assert tuple(stats.sample[0].tolist()) in truth
                for at in (tokens == MASK).nonzero()[:, 0].tolist():
                    token = int(stats.sample[0, at])
                    if by == "drawn":
                        marginal = sum(each for said, each in truth.items() if said[at] == token)
                        assert float(stats.sample_prob[0, at]) == pytest.approx(marginal, abs=1e-5)
                    else:
                        own = float(probs[at, token])
                        assert float(stats.own_prob[0, at]) == pytest.approx(own, abs=1e-5)
            assert engine.start[0] == 4
            assert bool(decision.finished)
