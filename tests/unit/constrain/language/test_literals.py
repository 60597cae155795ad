"""Lists of fixed texts: the automaton is that of the list, and the smallest."""

from random import Random
from time import process_time

import numpy as np
from helpers.cases import for_each

from vllm_diffusion.constrain.automaton.dfa import Dfa, minimised
from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.literals import acyclic, told_apart
from vllm_diffusion.constrain.language.syntax import (
    Call,
    Chars,
    Choice,
    Grammar,
    choice,
    sequence,
    text,
)


def table(words):
    """The automaton with the start in front."""
    states = acyclic(words)
    rows = np.full((len(states), 256), -1, dtype=np.int32)
    for number, (edges, _) in enumerate(states):
        for byte, to in edges:
            rows[-1 - number, byte] = len(states) - 1 - to
    accepting = np.array([final for _, final in reversed(states)])
    return Dfa(table=rows, column=np.arange(256, dtype=np.int32), accepting=accepting)


def accepted(states):
    """Every word, by walking all paths."""
    found, pending = [], [(len(states) - 1, b"")]
    for state, word in pending:
        edges, final = states[state]
        found += [word] * final
        pending += [(to, word + bytes([byte])) for byte, to in edges]
    return sorted(found)


@for_each(seed=range(30))
def test_exactly_the_words_and_no_state_too_many(seed):
    rng = Random(seed)
    words = {bytes(rng.choices(b"abc", k=rng.randint(0, 6))) for _ in range(rng.randint(1, 60))}
    assert accepted(acyclic(words)) == sorted(words)
    whole = table(words)
    assert len(minimised(whole)) == len(whole)


def test_texts_are_told_from_other_options():
    node = choice(
        text("a"),
        choice(sequence(text("b"), Chars(((0xE9, 0xE9),))), Call("rule")),
        Chars(((0x61, 0x62),)),
    )
    assert told_apart(node) == (
        [b"a", "bé".encode()],
        [Call("rule"), Chars(((0x61, 0x62),))],
    )


def test_mixed_options_are_read_as_they_were():
    node = sequence(choice(text("ab"), text("b"), Chars(((0x62, 0x63),))), text("."))
    dfa = Networks(Grammar({"root": node}, "root"), max_states=100).automaton(0)
    for word in (b"ab.", b"b.", b"c."):
        assert dfa.accepts(word)
    for word in (b"a.", b"bb.", b"b"):
        assert not dfa.accepts(word)


def test_twenty_thousand_values_take_no_time():
    rng = Random(0)
    words = [f"{rng.randrange(300)} of {n}" for n in range(20_000)]
    begin = process_time()
    node = Choice(tuple(map(text, words)))
    dfa = Networks(Grammar({"root": node}, "root"), max_states=8192 * 4).automaton(0)
    assert process_time() - begin < 5
    assert dfa.accepts(words[7].encode())
    assert not dfa.accepts(b"301 of 7")
