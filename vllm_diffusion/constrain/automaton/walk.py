"""One step of a ``TokenAutomaton`` on the host: from a state by a token.

Takes an automaton and token ids. Gives the state behind them, or ``DEAD`` if no text of the
constraint begins that way. The engine checks committed tokens with it, and whether a request's pins
leave a text possible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

DEAD: Final = -1
"""No state: no text of the constraint begins like this."""


class Walk:
    """Looks up edges; made once for each automaton, since it keeps a sorted copy of them."""

    def __init__(self, automaton: TokenAutomaton) -> None:
        self.automaton = automaton
        # Edges are in this order already, so one number an edge is a sorted table.
        self._keys = automaton.source.astype(np.int64) * automaton.num_classes + automaton.symbol

    def step(self, state: int, token: int) -> int:
        """The state behind a token, ``DEAD`` if there is none.

        Args:
            state: of the automaton.
            token: id, inside its vocabulary.
        """
        automaton = self.automaton
        if state == automaton.end:
            return state
        key = state * automaton.num_classes + int(automaton.class_of[token])
        edge = int(np.searchsorted(self._keys, key))
        found = edge < len(self._keys) and self._keys[edge] == key
        return int(automaton.target[edge]) if found else DEAD

    def through(self, state: int, tokens: Sequence[int]) -> int:
        """The state behind some tokens, ``DEAD`` if there is none."""
        for token in tokens:
            if (state := self.step(state, token)) == DEAD:
                break
        return state

    def can_hold(self, pins: Mapping[int, int], length: int) -> bool:
        """Whether some complete text of at most ``length`` tokens has given tokens at given places.

        Behind the end token any token may stand.

        Args:
            pins: place in the text, from 0, and the token there; no place is at or behind
                ``length``.
            length: tokens that may be written.
        """
        automaton = self.automaton
        edges = automaton.source, automaton.symbol, automaton.target
        states = np.zeros(automaton.num_states, dtype=bool)
        states[automaton.start] = True
        places = max(pins, default=-1) + 1
        for place in range(places):
            states = _onward(states, edges, automaton, pins.get(place))
        return bool((states & (automaton.distance <= length - places)).any())


def _onward(
    states: NDArray[np.bool_],
    edges: tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]],
    automaton: TokenAutomaton,
    token: int | None,
) -> NDArray[np.bool_]:
    """The states that one more token reaches, any or a given one."""
    source, symbol, target = edges
    taken = states[source]
    if token is not None:
        taken = taken & (symbol == automaton.class_of[token])
    reached = np.zeros_like(states)
    reached[target[taken]] = True
    reached[automaton.end] |= states[automaton.end]
    return reached
