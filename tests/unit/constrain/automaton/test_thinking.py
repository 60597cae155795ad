"""A constraint behind free thinking, beside what it says of every short sequence."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from helpers.cases import for_each
from helpers.choices import of_choices

from vllm_diffusion.constrain.automaton.thinking import Thinking, behind_thinking
from vllm_diffusion.constrain.automaton.walk import DEAD, Walk

VOCAB, END, UNTIL, OTHER_END = 7, 5, 6, 4
CHOICES = [[1, 2], [3]]


@for_each(until=[UNTIL, 1, 3], begin=[None, 0, 2, 3])
def test_every_sequence_of_four_tokens(until: int, begin: int | None) -> None:
    """``until`` and ``begin`` may also be tokens that the constraint reads, alone or not."""
    plain = Walk(of_choices(CHOICES, [END], VOCAB))
    thinking = Thinking(until=until, begin=begin, forbidden=(OTHER_END,))
    automaton = behind_thinking(plain.automaton, thinking, end_ids=[END])
    walk = Walk(automaton)
    for tokens in itertools.product(range(VOCAB), repeat=4):
        opened = begin is None or tokens[0] == begin
        inside = tokens if begin is None else tokens[1:]
        thought = inside.index(until) if until in inside else len(inside)
        expected = opened and not {END, OTHER_END} & set(inside[:thought])
        rest = inside[thought + 1 :]
        if expected and until in inside:
            state = plain.through(plain.automaton.start, rest)
            expected = state != DEAD
            reached = walk.through(automaton.start, tokens)
            if expected:
                assert automaton.distance[reached] == plain.automaton.distance[state]
                assert automaton.accepting[reached] == plain.automaton.accepting[state]
                assert (reached == automaton.end) == (state == plain.automaton.end)
        assert (walk.through(automaton.start, tokens) != DEAD) == expected, tokens


def test_a_class_that_is_shared_is_split() -> None:
    plain = of_choices(CHOICES, [END], VOCAB)
    # 1 and 0 now read alike; 1 ends the thinking, 0 does not.
    class_of = plain.class_of.copy()
    class_of[0] = class_of[1]
    shared = replace(plain, class_of=class_of)
    both = Walk(behind_thinking(shared, Thinking(until=1), end_ids=[END]))
    start = both.automaton.start
    assert both.through(start, [0, 0]) == start
    assert both.through(start, [0, 1, 0, 2, END]) == both.automaton.end
    assert both.through(start, [0, 1, 1, 2, END]) == both.automaton.end


@for_each(begin=[None, 0, 3])
def test_the_record_keeps_its_promises(begin: int | None) -> None:
    thinking = Thinking(until=UNTIL, begin=begin)
    automaton = behind_thinking(of_choices(CHOICES, [END], VOCAB), thinking, end_ids=[END])
    pairs = list(zip(automaton.source.tolist(), automaton.symbol.tolist(), strict=True))
    assert pairs == sorted(set(pairs))
    assert min(automaton.symbol) >= 1
    assert max(automaton.symbol) < automaton.num_classes
    assert automaton.end not in automaton.source
    assert automaton.accepting[automaton.end]
    assert not automaton.accepting[automaton.start]
    assert automaton.distance[automaton.start] == thinking.tokens + min(map(len, CHOICES))
    assert len(automaton.accepting) == len(automaton.distance) == automaton.num_states
    assert np.bincount(automaton.class_of, minlength=automaton.num_classes)[1:].all()
