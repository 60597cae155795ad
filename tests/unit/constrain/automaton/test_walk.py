"""Walking an automaton by hand, and what pins leave possible, beside enumeration."""

from __future__ import annotations

import itertools

from helpers.cases import for_each
from helpers.choices import of_choices
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_diffusion.constrain.automaton.walk import DEAD, Walk

VOCAB, END = 6, 5
CHOICES = [[1, 2], [1, 3, 1], [4]]


def test_a_text_leads_to_the_end_and_everything_from_there_back_to_it() -> None:
    walk = Walk(of_choices(CHOICES, [END], VOCAB))
    end = walk.automaton.end
    assert walk.through(walk.automaton.start, [1, 2, END]) == end
    assert walk.through(walk.automaton.start, [1, 2, END, 0, 1, END]) == end
    assert walk.through(walk.automaton.start, [1, 3]) not in {DEAD, end}


@for_each(tokens=[[0], [2], [END], [1, END], [1, 2, 2], [4, 4]])
def test_no_other_text_is_begun(tokens: list[int]) -> None:
    walk = Walk(of_choices(CHOICES, [END], VOCAB))
    assert walk.through(walk.automaton.start, tokens) == DEAD


def brute_force(pins: dict[int, int], length: int) -> bool:
    """Whether some choice, followed by an end token and anything, has the pins."""
    for choice in CHOICES:
        if len(choice) > length:
            continue
        text = [*choice, END]
        # What the choice and its end leave open can be anything; without room there is no end.
        if all(text[at] == token for at, token in pins.items() if at < len(text)):
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(
    pins=st.dictionaries(st.integers(0, 4), st.integers(0, VOCAB - 1), max_size=4),
    length=st.integers(1, 6),
)
def test_pins_that_some_text_can_hold(pins: dict[int, int], length: int) -> None:
    pins = {at: token for at, token in pins.items() if at < length}
    walk = Walk(of_choices(CHOICES, [END], VOCAB))
    assert walk.can_hold(pins, length) == brute_force(pins, length)


def test_every_pin_alone() -> None:
    walk = Walk(of_choices(CHOICES, [END], VOCAB))
    for at, token in itertools.product(range(4), range(VOCAB)):
        assert walk.can_hold({at: token}, 5) == brute_force({at: token}, 5), (at, token)
