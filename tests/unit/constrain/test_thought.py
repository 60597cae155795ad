"""Thinking before a text that a parser follows: alone, and before the parser of a guard."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from helpers.cases import for_each
from helpers.grammars import END, JSON, OTHER_END, SILENT, VOCABULARY, compiled, compiler

from vllm_diffusion.constrain.automaton.thinking import Thinking
from vllm_diffusion.constrain.thought import Thought

if TYPE_CHECKING:
    from vllm_diffusion.constrain.guard import Guard

BEGIN, UNTIL = (VOCABULARY.index(piece) for piece in (b"(", b")"))
BRACE, CLOSE = (VOCABULARY.index(piece) for piece in (b"{", b"}"))
THINKING = Thinking(begin=BEGIN, until=UNTIL, forbidden=(OTHER_END,))


def guard_of(thinking: Thinking = THINKING, **options: int | list[int]) -> Guard:
    return compiler().guard(compiled(JSON), end_tokens=[END], thinking=thinking, **options)


def legal(guard: Guard) -> set[int]:
    return set(guard.legal().nonzero()[:, 0].tolist())


def test_it_begins_and_ends_with_its_tokens() -> None:
    guard = guard_of()
    assert legal(guard) == {BEGIN}
    assert guard.walk([BRACE]) == 0
    assert guard.walk([BEGIN]) == 1
    assert legal(guard) == set(range(len(VOCABULARY))) - {END, OTHER_END}
    assert guard.walk([SILENT, BRACE, BEGIN, OTHER_END]) == 3
    assert guard.walk([UNTIL, BRACE, CLOSE, END]) == 4
    assert guard.is_over()


def test_a_prompt_may_have_opened_it() -> None:
    guard = guard_of(Thinking(until=UNTIL))
    assert guard.walk([CLOSE, UNTIL, CLOSE]) == 2
    assert BRACE in legal(guard)
    assert CLOSE not in legal(guard)


def test_what_opens_it_may_be_what_ends_it() -> None:
    guard = guard_of(Thinking(begin=UNTIL, until=UNTIL))
    assert guard.walk([UNTIL, CLOSE, UNTIL, CLOSE]) == 3


def test_half_of_the_tokens_are_left_for_the_text() -> None:
    guard = guard_of(tokens_left=8)
    assert guard.walk([BEGIN, CLOSE, CLOSE]) == 3
    assert legal(guard) == {UNTIL}
    assert guard.walk([CLOSE]) == 0
    again = guard_of(tokens_left=6, written=[BEGIN, CLOSE])
    assert again.walk([CLOSE]) == 1
    assert legal(again) == {UNTIL}
    assert guard_of(tokens_left=1).walk([BEGIN, UNTIL, CLOSE]) == 3, "beyond the budget all is free"


def test_a_look_ahead_is_forgotten_wherever_it_came_to() -> None:
    rng = random.Random(0)
    whole = [BEGIN, CLOSE, CLOSE, UNTIL, BRACE, CLOSE, END]
    for _ in range(50):
        guard, done = guard_of(), 0
        while done < len(whole):
            assert guard.walk(whole[done : done + rng.randint(0, 9)]) >= 0
            guard.rewind()
            count = rng.randint(0, len(whole) - done)
            guard.write(whole[done : done + count])
            done += count
        assert guard.is_over()


def test_what_is_not_legal_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="does not go on with token"):
        guard_of().write([BEGIN, END])


@for_each(most=[0, 2, 3, 9])
def test_it_takes_no_more_than_it_may(most: int) -> None:
    thought = Thought(THINKING, end_tokens=[END], most=most)
    count = 0
    while not thought.over:
        legal = thought.legal(len(VOCABULARY)).nonzero()[:, 0].tolist()
        assert thought.reads(next((token for token in legal if token != UNTIL), UNTIL))
        thought.write()
        count += 1
    assert count == max(most, 2)
    thought.rewind()
    assert thought.over
    assert not thought.ahead
