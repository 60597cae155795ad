"""Directed graphs as arrays of edges: who precedes whom, and how far it is to a goal."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]


class Predecessors:
    """The states that lead into given ones. Edges may repeat."""

    def __init__(self, source: Ints, target: Ints, num_states: int) -> None:
        order = np.argsort(target, kind="stable")
        self._source = source[order]
        self._first = np.searchsorted(target[order], np.arange(num_states + 1))

    def of(self, states: Ints) -> Ints:
        """Those before any of ``states``; one that leads there twice is listed twice."""
        first, count = self._first[states], self._first[states + 1] - self._first[states]
        offset = np.repeat(first - np.cumsum(count) + count, count)
        before: Ints = self._source[offset + np.arange(len(offset))]
        return before


def distances(source: Ints, target: Ints, goals: NDArray[np.bool_]) -> Ints:
    """Fewest edges from every state to a goal; -1 where no path leads to one. [N] int32."""
    before = Predecessors(source, target, len(goals))
    distance = np.where(goals, 0, -1).astype(np.int32)
    frontier = np.flatnonzero(goals).astype(np.int32)
    length = 0
    while len(frontier):
        length += 1
        reached = before.of(frontier)
        frontier = np.unique(reached[distance[reached] < 0])
        distance[frontier] = length
    return distance


def reachable(source: Ints, target: Ints, starts: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The states that a path from a start leads to, starts among them. [N] bool."""
    return distances(target, source, starts) >= 0
