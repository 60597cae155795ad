"""Token classes, edges and distances against a walk token by token, state by state."""

import pickle
from collections import deque

import numpy as np
import pytest
from helpers.cases import for_each
from helpers.spelling import END, PAD, SPECIAL, VOCABULARY, after

from vllm_diffusion.constrain.automaton.allowed import restricted
from vllm_diffusion.constrain.automaton.classes import Limits, token_automaton
from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
from vllm_diffusion.constrain.language.regex import regex
from vllm_diffusion.constrain.language.syntax import Grammar, mark
from vllm_diffusion.errors import AutomatonError, ConstraintError

EXPRESSIONS = ["(a|b)*ab", '"[^"]{0,5}"', "yes|no", "é*x?", r'\{"a": (true|null|\d{1,3})\}', ".*"]


def dfa_of(expression):
    return Networks(Grammar({"r": regex(expression)}, "r"), max_states=1000).automaton(0)


def tokens_of(expression, vocabulary=VOCABULARY, limits=None, **options):
    options = {"end_ids": [END], **options}
    return token_automaton(dfa_of(expression), vocabulary, limits=limits or Limits(), **options)


def naive(dfa, vocabulary, usable):
    """Transitions {state: {token: state}} of the states that are live, and their distances."""

    def step(state, token):
        for byte in vocabulary.text(token):
            state = int(dfa.table[state, dfa.column[byte]])
            if state < 0:
                return None
        return state

    tokens = [t for t in usable if vocabulary.text(t)]
    moves = {s: {t: n for t in tokens if (n := step(s, t)) is not None} for s in range(len(dfa))}
    distance = {s: 0 for s in range(len(dfa)) if dfa.accepting[s]}
    for _ in range(len(dfa)):
        for s, row in moves.items():
            near = [distance[n] + 1 for n in row.values() if n in distance]
            if near:
                distance[s] = min(distance.get(s, 10**9), *near)
    return moves, distance


@for_each(expression=EXPRESSIONS, allowed=[None, [*range(3, 130), *range(262, 270)]])
def test_equals_a_walk_token_by_token(expression, allowed):
    dfa = dfa_of(expression)
    usable = range(3, len(VOCABULARY)) if allowed is None else allowed
    moves, distance = naive(dfa, VOCABULARY, usable)
    automaton = tokens_of(expression)
    if allowed is not None:
        automaton = restricted(automaton, allowed)
    pairs, pending = {0: automaton.start}, deque([0])  # state of the bytes -> state of the tokens
    while pending:
        state = pending.popleft()
        here = pairs[state]
        assert automaton.distance[here] == distance[state]
        assert automaton.accepting[here] == dfa.accepting[state]
        edges = np.flatnonzero(automaton.source == here)
        to = dict(
            zip(automaton.symbol[edges].tolist(), automaton.target[edges].tolist(), strict=True)
        )
        assert len(to) == len(edges), "one edge by a class"
        for token in range(len(VOCABULARY)):
            behind = to.get(int(automaton.class_of[token]))
            expected = moves[state].get(token)
            if token == END:
                assert behind == (automaton.end if dfa.accepting[state] else None)
            elif expected is None or expected not in distance:
                assert behind is None
            elif expected in pairs:
                assert behind == pairs[expected]
            else:
                pairs[expected] = behind
                pending.append(expected)
    assert len(set(pairs.values())) == len(pairs) == automaton.num_states - 1
    assert automaton.distance.min() >= 0


@for_each(expression=EXPRESSIONS)
def test_the_record_keeps_its_promises(expression):
    automaton = tokens_of(expression)
    order = np.lexsort((automaton.symbol, automaton.source))
    assert (order == np.arange(len(order))).all()
    assert automaton.class_of[[PAD, SPECIAL]].tolist() == [0, 0]
    assert (automaton.symbol >= 1).all()
    assert set(automaton.class_of) | {0} == set(range(automaton.num_classes))
    assert not (automaton.source == automaton.end).any()
    assert automaton.accepting[automaton.end]
    assert automaton.distance[automaton.end] == 0
    # No two classes do the same.
    table = np.full((automaton.num_states, automaton.num_classes), -1)
    table[automaton.source, automaton.symbol] = automaton.target
    assert len(np.unique(table, axis=1).T) == automaton.num_classes


def test_a_pickle_is_the_same():
    automaton = tokens_of('"[^"]{0,5}"')
    again = pickle.loads(pickle.dumps(automaton))
    for name in ("class_of", "source", "symbol", "target", "accepting", "distance"):
        assert (getattr(again, name) == getattr(automaton, name)).all()
        assert getattr(again, name).dtype == getattr(automaton, name).dtype
    assert (again.start, again.end, again.depth) == (automaton.start, automaton.end, None)


def test_several_ends_and_an_end_that_could_be_read():
    letter = next(t for t in range(3, 259) if VOCABULARY.text(t) == b"b")
    automaton = tokens_of("ab*", end_ids=[END, letter])
    a = letter - 1
    assert after(automaton, [a, letter]) == after(automaton, [a, END]) == automaton.end
    assert after(automaton, [letter]) is None


def test_nothing_satisfies():
    with pytest.raises(ConstraintError, match="Nothing satisfies the constraint"):
        tokens_of("[^\\d\\D]a")
    with pytest.raises(ConstraintError, match="can be written with allowed_token_ids"):
        restricted(tokens_of("ab"), [5, 6])


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(states=5), "6 states, more than the 5"),
        (Limits(classes=3), "token classes, more than the 3"),
        (Limits(edges=4), "edges, more than the 4"),
    ],
)
def test_limits(limits, message):
    with pytest.raises(AutomatonError, match=message):
        tokens_of("yes|no|ok", limits=limits)


def test_a_vocabulary_is_a_trie_of_its_texts():
    texts = [b"", b"ab", b"a", b"", b"abc", b"\xff", b"ab", b"b" * 40]
    vocabulary = Vocabulary.of(texts, special=[2])
    unread = [b"" if b"\xff" in text else text for text in texts[3:]]  # no text has this byte
    assert [vocabulary.text(t) for t in range(8)] == [b"", b"ab", mark(2), *unread]
    assert vocabulary.levels.tolist()[:4] == [0, 1, 4, 7]
    assert vocabulary.levels[-1] == len(vocabulary.parent) == 1 + 3 + 1 + 40 + 3
    assert vocabulary.node[1] == vocabulary.node[6]
    assert Vocabulary.of(texts).fingerprint != vocabulary.fingerprint
