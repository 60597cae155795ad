"""What the head and an automaton say together, against enumeration; canvases that obey."""

from __future__ import annotations

from itertools import count, islice
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from helpers.chains import FAR, enumerate_canvas, random_automaton, random_canvas, read
from helpers.table_model import CONSTANTS, LENGTH, VOCAB, Engine, TableModel

from vllm_diffusion.belief import beliefs
from vllm_diffusion.constrain.automaton.slots import ConstrainedCanvases, DeviceAutomaton
from vllm_diffusion.constrain.constraints import Constraints
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.records import Noise

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

HEAD = ReferenceHead(logits=lambda hidden: hidden, soft_embedding=lambda prob: prob, max_rows=7)


def rows_of_logits(logits: torch.Tensor) -> Rows:
    """[B, L, V] logits, as the hidden rows of a head that passes them on."""
    flat = logits.flatten(0, 1)
    counter = torch.arange(len(flat))
    return Rows(
        hidden=flat,
        temperature=torch.ones(len(flat)),
        noise=Noise(seed=torch.full((len(flat), 2), 3), position=counter, step=counter * 0),
    )


def possible(seed: int) -> bool:
    automaton = random_automaton(seed)
    return enumerate_canvas(automaton, random_canvas(seed, automaton, 4, spread=1.5)).z > 0


@for_each(seed=list(islice(filter(possible, count()), 10)))
def test_statistics_of_a_constrained_canvas_are_those_of_its_marginals(seed: int) -> None:
    automaton = random_automaton(seed)
    length = 4
    canvas = random_canvas(seed, automaton, length, spread=1.5)
    truth = enumerate_canvas(automaton, canvas)
    free = torch.randn(length, len(automaton.class_of))
    logits = torch.stack([free, canvas.probs.log().float()])
    obeying = ConstrainedCanvases(
        automaton=DeviceAutomaton.of(automaton, torch.device("cpu")),
        places=(1,),
        canvas=torch.tensor([1]),
        start=torch.tensor([canvas.start]),
        rows=torch.tensor([canvas.rows]),
        left=torch.tensor([canvas.left]),
    )
    rows = rows_of_logits(logits)
    read_rows = torch.ones(2, length, dtype=torch.bool)
    stats = beliefs(HEAD, rows, num=2, read=read_rows, automata=(obeying,))
    alone = beliefs(HEAD, rows, num=2, read=read_rows)

    # The canvas beside it, and the rows behind what obeys, are as without any automaton.
    for field in ("argmax", "sample", "entropy", "top_prob", "margin", "soft_embedding"):
        with_it, without = getattr(stats, field), getattr(alone, field)
        assert torch.equal(with_it[0], without[0])
        assert torch.equal(with_it[1, canvas.rows :], without[1, canvas.rows :])

    said = stats.argmax[1, : canvas.rows].tolist()
    weight = torch.tensor([float(canvas.probs[row, token]) for row, token in enumerate(said)])
    assert float(weight.double().prod()) == pytest.approx(truth.best, rel=1e-5)
    for row, token in enumerate(said):
        marginal = truth.token[row]
        assert float(stats.top_prob[1, row]) == pytest.approx(float(marginal[token]), abs=1e-6)
        entropy = float(-torch.xlogy(marginal, marginal).sum())
        assert float(stats.entropy[1, row]) == pytest.approx(entropy, abs=2e-6)
        assert float(marginal[stats.sample[1, row]]) > 0


def automata() -> list[TokenAutomaton]:
    """Four that have something to say."""
    made = (random_automaton(seed, states=6, classes=5, vocab=VOCAB) for seed in count())
    return list(islice((each for each in made if each.distance[each.start] < FAR), 4))


@pytest.mark.parametrize("fused", [False, True])
@for_each(width=[1, 5, LENGTH])
def test_what_canvases_commit_is_accepted_and_complete(width: int, *, fused: bool) -> None:
    budget = 2 * width + 6
    engine = Engine(TableModel(sharpness=0.5))
    made = automata()
    for slot, automaton in enumerate(made):
        engine.admit(slot, seed=slot, start=3, width=width, automaton=automaton, budget=budget)
        engine.pool.fused[slot] = fused
    slots = tuple(range(len(made)))
    while min(engine.start[slot] for slot in slots) < 3 + budget:
        engine.step(*slots)
    for slot, automaton in enumerate(made):
        said = engine.text[slot, 3 : 3 + budget].tolist()
        states = read(automaton, automaton.start, said)
        assert states[-1] >= 0
        assert automaton.accepting[states[-1]]


def test_a_constrained_canvas_is_the_same_alone_and_in_company() -> None:
    automaton, other, _, _ = automata()
    texts = []
    for company in ((), (1, 4, 5)):
        engine = Engine(TableModel(sharpness=0.5))
        engine.admit(2, seed=7, start=3, automaton=automaton, budget=70)
        engine.admit(1, seed=8, start=9, automaton=automaton, budget=33)
        engine.admit(4, seed=9, start=0, width=9, automaton=other)
        engine.admit(5, seed=10, start=30)
        while engine.start[2] < 3 + 64:
            engine.step(2, *company)
        texts.append(engine.text[2, 3 : 3 + 64].tolist())
    assert texts[0] == texts[1]


def test_a_constraint_wins_over_other_wishes() -> None:
    automaton = automata()[0]
    engine = Engine(TableModel(sharpness=0.5))
    # Forbids, allows and cuts next to everything that the automaton reads.
    read_ids = [token for token in range(VOCAB) if automaton.class_of[token]]
    wishes = Constraints(
        allowed=(read_ids[0],),
        early=tuple((token, 99) for token in read_ids[1:9]),
        top_k=1,
        bias=((read_ids[0], -50.0),),
    )
    engine.admit(0, seed=1, start=0, constraints=wishes, automaton=automaton, budget=48)
    while engine.start[0] < 48:
        engine.step(0)
    states = read(automaton, automaton.start, engine.text[0, :48].tolist())
    assert states[-1] >= 0
    assert automaton.accepting[states[-1]]


def test_a_greedy_sample_is_the_most_likely_canvas() -> None:
    automaton = automata()[1]
    engine = Engine(TableModel(sharpness=0.5))
    engine.admit(0, seed=1, start=0, constraints=Constraints(temperature=0.0), automaton=automaton)
    before = engine.pool.tokens[0].clone()
    engine.step(0)
    kept = engine.pool.tokens[0] == engine.pool.argmax[0]
    assert bool(kept.any())
    assert not torch.equal(before, engine.pool.tokens[0])
    assert CONSTANTS.max_steps > 1
