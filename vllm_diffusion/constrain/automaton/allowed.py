"""An automaton limited to texts that some tokens can write."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_diffusion.constrain.automaton.graph import distances, reachable
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Collection

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton


def restricted(automaton: TokenAutomaton, allowed: Collection[int]) -> TokenAutomaton:
    """The same texts, as far as they can be written with some tokens.

    End tokens stay, and the numbers of the classes.

    Args:
        automaton: of the constraint.
        allowed: ids.

    Raises:
        ConstraintError: no text is left.
    """
    ending = automaton.symbol[automaton.target == automaton.end]
    kept = np.isin(automaton.class_of, ending)
    kept[[token for token in allowed if token < len(kept)]] = True
    class_of = np.where(kept, automaton.class_of, 0).astype(np.int32)
    read = np.zeros(automaton.num_classes, dtype=bool)
    read[class_of] = True
    edges = read[automaton.symbol]
    source, symbol, target = (
        each[edges] for each in (automaton.source, automaton.symbol, automaton.target)
    )
    distance = distances(source, target, automaton.accepting)
    starts = np.arange(automaton.num_states) == automaton.start
    live = (distance >= 0) & reachable(source, target, starts)
    if not live[automaton.start]:
        raise ConstraintError("No text of the constraint can be written with allowed_token_ids.")
    number = (np.cumsum(live) - 1).astype(np.int32)
    onward = live[source] & live[target]
    return replace(
        automaton,
        class_of=class_of,
        source=number[source[onward]],
        symbol=symbol[onward],
        target=number[target[onward]],
        num_states=int(live.sum()),
        start=int(number[automaton.start]),
        accepting=automaton.accepting[live],
        distance=distance[live],
    )
