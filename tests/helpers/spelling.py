"""Token automata in tests: a small vocabulary, texts that one accepts, whether it accepts one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

END, PAD, SPECIAL = 0, 1, 2
"""Special tokens of ``VOCABULARY``."""

_WORDS = '{" "} ": ": ," [" ] "a 12 00 tr true null al se é \u20ac "," a b \\n \\" \\u0 \U0001f600x'
_PIECES = [word.encode() for word in _WORDS.split(" ") if word]

VOCABULARY = Vocabulary.of(
    [b"<end>", b"<pad>", b"<special>", *(bytes([byte]) for byte in range(256)), *_PIECES],
    special=[END, PAD, SPECIAL],
)
"""Every byte, so that any text can be written, and pieces across the borders of JSON's parts."""


def accepts(automaton: TokenAutomaton, tokens: Sequence[int]) -> bool:
    """Whether tokens, then an end token, are a text that the automaton accepts."""
    state = after(automaton, tokens)
    return state is not None and bool(automaton.accepting[state])


def after(automaton: TokenAutomaton, tokens: Sequence[int]) -> int | None:
    """The state behind tokens; None where there is none."""
    state: int | None = automaton.start
    for token in tokens:
        if state == automaton.end:
            continue
        symbol = automaton.class_of[token]
        found = np.flatnonzero((automaton.source == state) & (automaton.symbol == symbol))
        if len(found) == 0:
            return None
        state = int(automaton.target[found[0]])
    return state


def spelled(text: str, rng: np.random.Generator, vocabulary: Vocabulary = VOCABULARY) -> list[int]:
    """A text as tokens, cut up at random."""
    by_text = {vocabulary.text(token): token for token in range(SPECIAL + 1, len(vocabulary))}
    data, tokens = text.encode(), []
    while data:
        lengths = [n for n in range(1, 8) if data[:n] in by_text]
        length = int(rng.choice(lengths))
        tokens.append(by_text[data[:length]])
        data = data[length:]
    return tokens


class Walk:
    """Texts that an automaton accepts, drawn edge by edge."""

    def __init__(
        self, automaton: TokenAutomaton, seed: int, vocabulary: Vocabulary = VOCABULARY
    ) -> None:
        self._automaton, self._vocabulary = automaton, vocabulary
        self._rng = np.random.default_rng(seed)
        self._edges = np.split(
            np.arange(len(automaton.source)),
            np.searchsorted(automaton.source, np.arange(1, automaton.num_states)),
        )
        self._members = [
            np.flatnonzero(automaton.class_of == symbol) for symbol in range(automaton.num_classes)
        ]

    def tokens(self, free: int) -> list[int]:
        """Tokens of one text: ``free`` of them at random, from then on the shortest way out."""
        automaton, state, tokens = self._automaton, self._automaton.start, []
        while True:
            edges = self._edges[state]
            if len(tokens) >= free:
                nearest = automaton.distance[automaton.target[edges]]
                nearest[automaton.target[edges] == automaton.end] = -1
                edges = edges[nearest == nearest.min()]
            edge = self._rng.choice(edges)
            state = int(automaton.target[edge])
            if state == automaton.end:
                return tokens
            tokens.append(int(self._rng.choice(self._members[automaton.symbol[edge]])))

    def text(self, free: int) -> str:
        """One text; UnicodeDecodeError if it is not UTF-8."""
        return b"".join(map(self._vocabulary.text, self.tokens(free))).decode()
