from itertools import product
from random import Random

import numpy as np
import pytest
from helpers.cases import for_each

from vllm_diffusion.constrain.automaton.dfa import Dfa, Moves, determinised, minimised
from vllm_diffusion.constrain.automaton.graph import distances, reachable
from vllm_diffusion.errors import AutomatonError


def random_nfa(rng, states=6, symbols=4):
    edges = {
        state: tuple(
            (first, rng.randint(first, symbols - 1), rng.randrange(states))
            for first in (rng.randrange(symbols) for _ in range(rng.randint(0, 3)))
        )
        for state in range(states)
    }
    accepting = {state for state in range(states) if rng.random() < 0.3}
    return lambda state: Moves(edges[state], state in accepting)


def follows(moves, word):
    states = {0}
    for symbol in word:
        states = {to for s in states for a, b, to in moves(s).edges if a <= symbol <= b}
    return any(moves(state).accepting for state in states)


def words(symbols, length):
    return (word for n in range(length + 1) for word in product(range(symbols), repeat=n))


def indistinguishable(dfa):
    """Pairs of states with one language, by the textbook table of distinguished pairs."""
    n = len(dfa)
    apart = dfa.accepting[:, None] != dfa.accepting[None, :]
    padded = np.pad(dfa.table, ((0, 1), (0, 0)), constant_values=-1)
    apart = np.pad(apart, (0, 1))
    apart[n, :n] = apart[:n, n] = dfa.accepting
    for _ in range(n + 1):
        for column in padded.T:
            apart |= apart[np.ix_(column, column)]
    return {(p, q) for p in range(n) for q in range(p) if not apart[p, q]}


@for_each(seed=range(60))
def test_deterministic_and_minimal_automata_accept_the_same(seed):
    moves = random_nfa(Random(seed))
    whole = determinised(0, moves, symbols=4, max_states=100)
    small = minimised(whole)
    for word in words(4, 5):
        assert whole.accepts(word) == small.accepts(word) == follows(moves, word)
    assert len(small) <= len(whole)
    assert not indistinguishable(small)
    assert not small.is_empty() or len(small) == 1


def test_a_chain_and_a_counter_are_minimal():
    # Every state accepts within one step: no shortest word tells them apart, only long ones do.
    edges = {n: ((0, 0, n + 1), (1, 1, 99)) for n in range(50)} | {
        50: ((1, 1, 99),),
        99: ((1, 1, 99),),
    }
    dfa = determinised(0, lambda n: Moves(edges[n], n == 99), symbols=2, max_states=100)
    assert len(minimised(dfa)) == 52
    same = {n: ((0, 0, (n + 1) % 50), (1, 1, 99)) for n in range(50)} | {99: ()}
    dfa = determinised(0, lambda n: Moves(same[n], n == 99), symbols=2, max_states=100)
    assert len(minimised(dfa)) == 2


def test_columns_of_symbols_that_no_state_tells_apart_are_one():
    dfa = determinised(
        0, lambda n: Moves(((97, 122, 1),) if n == 0 else (), n == 1), symbols=256, max_states=9
    )
    assert dfa.table.shape == (2, 2)
    assert dfa.accepts(b"q")
    assert not dfa.accepts(b"Q")


def test_too_many_states():
    with pytest.raises(AutomatonError, match="more than 5 states"):
        determinised(0, lambda n: Moves(((0, 0, n + 1),), False), symbols=2, max_states=5)


def test_too_much_work():
    everywhere = tuple((0, 0, n) for n in range(2000)) + tuple((1, 1, n) for n in range(1000))
    with pytest.raises(AutomatonError, match="too many ways at once"):
        determinised(0, lambda _: Moves(everywhere, False), symbols=2, max_states=5)


def test_graphs():
    source = np.array([0, 1, 2, 4], dtype=np.int32)
    target = np.array([1, 2, 0, 2], dtype=np.int32)
    goals = np.array([False, False, True, False, False])
    assert distances(source, target, goals).tolist() == [2, 1, 0, -1, 1]
    assert reachable(source, target, np.arange(5) == 0).tolist() == [True, True, True, False, False]


def test_an_empty_language_is_one_state():
    dfa = Dfa(
        table=np.array([[1], [1]], dtype=np.int32),
        column=np.zeros(2, np.int32),
        accepting=np.zeros(2, bool),
    )
    assert minimised(dfa).is_empty()
    assert len(minimised(dfa)) == 1
