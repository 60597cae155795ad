"""Small automata made by hand: the texts they accept are a list.

Takes sequences of token ids. Gives a ``TokenAutomaton`` and what it accepts, by enumeration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_diffusion.constrain.automaton.record import TokenAutomaton

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def of_choices(
    choices: Sequence[Sequence[int]], end_ids: Collection[int], vocab: int
) -> TokenAutomaton:
    """Accepts one of the texts, then an end token, then anything. A trie, one class a token."""
    tokens = sorted({token for choice in choices for token in choice})
    class_of = np.zeros(vocab, dtype=np.int32)
    class_of[tokens] = np.arange(1, len(tokens) + 1)
    end_class = len(tokens) + 1
    class_of[list(end_ids)] = end_class
    states: dict[tuple[int, ...], int] = {}
    for choice in choices:
        for length in range(len(choice) + 1):
            states.setdefault(tuple(choice[:length]), len(states))
    accepting = [prefix in {tuple(choice) for choice in choices} for prefix in states]
    end = len(states)
    edges = [
        (states[prefix[:-1]], int(class_of[prefix[-1]]), state)
        for prefix, state in states.items()
        if prefix
    ]
    edges += [(state, end_class, end) for state, is_last in enumerate(accepting) if is_last]
    source, symbol, target = (np.array(each, np.int32) for each in zip(*sorted(edges), strict=True))
    distance = [
        min(
            len(choice) - len(prefix)
            for choice in choices
            if tuple(choice[: len(prefix)]) == prefix
        )
        for prefix in states
    ]
    return TokenAutomaton(
        class_of=class_of,
        num_classes=end_class + 1,
        source=source,
        symbol=symbol,
        target=target,
        num_states=end + 1,
        start=states[()],
        accepting=np.array([*accepting, True]),
        distance=np.array([*distance, 0], np.int32),
    )
