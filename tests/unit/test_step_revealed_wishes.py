"""``advance`` where noise is masks: bad words, grammars on the host, penalties, given tokens."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.absorbing import (
    BLOCK,
    GRID,
    MASK,
    PUBLISHED,
    SDAR,
    VOCAB,
    Engine,
    any_rule,
    greedy,
)
from helpers.cases import for_each
from helpers.grammars import (
    ARITHMETIC,
    BRACKETS,
    END,
    JSON,
    JUDGES,
    TREE,
    VOCABULARY,
    compiled,
    compiler,
    may_be_begun,
    written,
)

from vllm_diffusion.constrain.constraints import Constraints, Holes
from vllm_diffusion.constrain.rewrite import BadWords
from vllm_diffusion.constrain.words import completing_ids, held_back, repaired, word_table
from vllm_diffusion.denoise.constants import RevealConstants

if TYPE_CHECKING:
    from vllm_diffusion.constrain.guard import Guard

EITHER = pytest.mark.parametrize("family", list(PUBLISHED))
BUDGET = 30


# ---- bad words ----


def holds(word: tuple[int, ...], text: list[int]) -> bool:
    return any(tuple(text[at : at + len(word)]) == word for at in range(len(text)))


@EITHER
@for_each(seed=range(30))
def test_no_word_is_said_however_much_the_model_wants_to(family: str, seed: int) -> None:
    rng = random.Random(seed)
    kind, rule = PUBLISHED[family]
    rule = rule if seed % 2 else any_rule(seed)
    asked = Constraints(temperature=rng.choice([0.0, 1.0]))
    plain = Engine(kind, rule, seed=seed, sharpness=0.3)
    # Few ids are likely, so words come up everywhere.
    likely = tuple((token, 6.0) for token in rng.sample(range(3, VOCAB), 3))
    asked = replace(asked, bias=likely)
    plain.admit(seed=seed, start=3, constraints=asked)
    wanted = plain.run(BUDGET)
    words = []
    for length in (1, 2, 2, 3, 4):
        at = rng.randrange(BUDGET - length)
        words.append(tuple(wanted[at : at + length]))
    words = [word for word in words if len(word) > 1 or seed % 5 == 0]
    assert any(holds(word, wanted) for word in words)
    engine = Engine(kind, rule, seed=seed, sharpness=0.3)
    fused = rng.random() < 0.5
    engine.admit(
        seed=seed, start=3, constraints=replace(asked, bad_words=tuple(words)), fused=fused
    )
    said = engine.run(BUDGET)
    assert not any(holds(word, said) for word in words)
    assert MASK not in said


def test_a_step_that_holds_a_position_back_reveals_another() -> None:
    # One step would reveal all, and every pair of neighbours is a word.
    rule = RevealConstants(max_steps=BLOCK, reveal_threshold=1e-6, reveal_by="drawn")
    asked = greedy(Constraints(bias=((5, 50.0), (6, 49.0)), bad_words=((5, 5), (6, 6), (5, 6))))
    engine = Engine(GRID, rule, sharpness=0.1)
    engine.admit(start=0, constraints=asked)
    revealed = []
    for _ in range(BLOCK):
        engine.step(0)
        _, decision = engine.decisions[-1]
        revealed.append(int(decision.accept.sum()))
        if bool(decision.finished):
            break
    assert min(revealed) >= 1
    assert sum(revealed) == BLOCK
    assert len(revealed) > 1
    said = engine.run(BLOCK)
    assert not any(pair in {(5, 5), (6, 6), (5, 6)} for pair in pairwise(said))


def words_of(*words: tuple[int, ...], before: tuple[int, ...] = ()) -> BadWords:
    rest, last = word_table([words], torch.device("cpu"))
    reach = rest.shape[2]
    padded = [*[-2] * reach, *before][-reach:]
    return BadWords(rest=rest, last=last, before=torch.tensor([padded]))


def test_the_ids_that_complete_a_word() -> None:
    words = words_of((1, 2, 3), (4, 5), (9,), before=(1,))
    tokens = torch.tensor([[-2, 3, -2, 5, 1, -2, 3, 4]])
    found = [set(row.tolist()) - {-1} for row in completing_ids(words, tokens)[0]]
    assert found == [{2, 9}, {9, 2} - {2}, {4, 9}, {9}, {9}, {2, 9}, {9}, {9}]


def test_the_last_position_of_a_joint_word_is_held_back() -> None:
    words = words_of((1, 2, 3), (4, 5), (7, 7), before=(1, 2))
    tokens = torch.tensor([[3, 4, 5, 1, 2, 3, 7, 7]])
    accept = torch.tensor([[True, True, True, True, True, False, False, True]])
    # 1 2 3 and 7 7 were completed by one position each: nothing else was left there.
    assert held_back(words, tokens, accept)[0].nonzero().flatten().tolist() == [2, 4]


def test_a_repair_goes_around_what_stays() -> None:
    words = words_of((1, 2), (2, 3), (8, 3))
    tokens = torch.tensor([[1, 2, 3]])
    stays = torch.tensor([[True, False, True]])
    candidates = torch.tensor([[[2, 8, 6]] * 3])
    assert repaired(words, tokens, candidates, stays).tolist() == [[1, 6, 3]]
    assert repaired(words, tokens, candidates).tolist() == [[1, 8, 2]]


# ---- a parser on the host ----


GRAMMARS = {"json": JSON, "arithmetic": ARITHMETIC, "brackets": BRACKETS, "tree": TREE}
CLOSING = tuple((VOCABULARY.index(each), 1.0) for each in (b")", b"]", b"}", b"]]", b"))"))


def guard_of(grammar: tuple[str, str], budget: int = BUDGET) -> Guard:
    return compiler().guard(compiled(grammar), tokens_left=budget, end_tokens=[END])


@EITHER
@pytest.mark.parametrize("name", list(GRAMMARS))
def test_a_grammar_is_obeyed_and_what_is_revealed_stays(family: str, name: str) -> None:
    grammar, complete = GRAMMARS[name], 0
    for seed in range(6):
        rng = random.Random(seed)
        kind, rule = PUBLISHED[family]
        rule = rule if seed % 2 else any_rule(seed)
        engine = Engine(kind, rule, seed=seed, sharpness=rng.choice([0.0, 0.7, 3.0]))
        wishes = Constraints(bias=((END, 4.0), *CLOSING), temperature=float(rng.random() < 0.5))
        engine.admit(
            seed=seed,
            start=rng.randrange(1, 12),
            constraints=wishes,
            guard=guard_of(grammar),
            fused=rng.random() < 0.5,
        )
        said = until_end(engine)
        text, ended = written(said)
        complete += ended
        assert JUDGES[grammar](text) if ended else may_be_begun(grammar, said)
        assert MASK not in said
        revealed_for_good(engine)
    assert complete


def until_end(engine: Engine) -> list[int]:
    for length in range(1, BUDGET + 1):
        said = engine.run(length)
        if END in said:
            return said[: said.index(END) + 1]
    return said


def revealed_for_good(engine: Engine) -> None:
    """Every step reveals something, and only what was open."""
    before = None
    for _, decision in engine.decisions:
        assert bool(decision.accept.any()) or before is None
        if before is not None:
            known = before != MASK
            assert torch.equal(decision.next_tokens[0][known], before[known])
            assert not bool(decision.accept[0][known].any())
        before = None if bool(decision.finished) else decision.next_tokens[0]


def test_a_draft_that_is_not_legal_gives_way() -> None:
    for seed in range(6):
        engine = Engine(*PUBLISHED["whole"], seed=seed)
        draft = tuple(random.Random(seed).choice([-1, 5, 9, 30]) for _ in range(2 * BLOCK))
        engine.admit(
            seed=seed,
            constraints=Constraints(seed_canvas=draft, first_step=seed, bias=CLOSING),
            guard=guard_of(BRACKETS),
        )
        said = until_end(engine)
        assert may_be_begun(BRACKETS, said) or JUDGES[BRACKETS](written(said)[0])


# ---- penalties, given tokens ----


@EITHER
def test_revealed_tokens_are_penalised_and_masks_are_not(family: str) -> None:
    kind, _ = PUBLISHED[family]
    rule = RevealConstants(max_steps=BLOCK, reveal_threshold=0.0, reveal_by="leftmost")
    asked = greedy(Constraints(bias=((7, 30.0),), presence=100.0))
    engine = Engine(kind, rule, sharpness=0.01)
    engine.admit(start=BLOCK, constraints=asked)
    said = engine.run(3 * BLOCK)
    assert len(set(said)) == len(said)
    assert said[0] == 7
    repeated = Engine(kind, rule, sharpness=0.01)
    repeated.admit(start=BLOCK, constraints=replace(asked, presence=0.0))
    assert set(repeated.run(3 * BLOCK)) == {7}


@EITHER
def test_pins_are_there_from_the_first_step_and_come_out(family: str) -> None:
    kind, rule = PUBLISHED[family]
    start = BLOCK
    asked = Constraints(seed_canvas=(-1, 11, -1, 12, -1), pinned=(1, 3))
    engine = Engine(kind, rule)
    engine.admit(start=start, constraints=asked)
    assert engine.pool.tokens[0].tolist() == [MASK, 11, MASK, 12, MASK, MASK, MASK, MASK]
    said = engine.run(BLOCK)
    assert (said[1], said[3]) == (11, 12)
    assert not any(bool(decision.accept[0, [1, 3]].any()) for _, decision in engine.decisions)


def test_slack_leaves_a_template_and_no_word_is_made_by_it() -> None:
    # Two holes of two, filled with a token and a pad; the tokens beside the second pad are a word.
    pad, end = 40, 41
    rows = (-1, -1, 13, -1, -1, 14, end, pad)
    asked = Constraints(
        seed_canvas=rows,
        pinned=(2, 5, 6, 7),
        holes=Holes(shown=7, pad=pad, end=-1),
        bias=((pad, 40.0),),
        bad_words=((13, 14),),
    )
    for temperature in (0.0, 1.0):
        engine = Engine(GRID, SDAR, sharpness=0.1)
        engine.admit(start=BLOCK, constraints=replace(asked, temperature=temperature))
        while not engine.start[0] > BLOCK:
            engine.step(0)
        said = engine.said()
        assert pad not in said
        assert said[-1] == end
        assert {13, 14} <= set(said)
