"""Deterministic automata over small alphabets: subset construction and minimisation.

Symbols are ints from 0: the 256 bytes, and above them, in the network of a grammar's rule, the
rules that it calls. Symbols that no state tells apart share one column of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from vllm_diffusion.constrain.automaton.graph import Predecessors, distances, reachable
from vllm_diffusion.errors import AutomatonError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

# Edges that may be looked at for every state allowed: what is ambiguous costs time, not states.
_WORK_PER_STATE = 512

State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Moves(Generic[State]):
    """What a nondeterministic state can do, steps that read nothing included."""

    edges: tuple[tuple[int, int, State], ...]  # first symbol, last symbol, next state
    accepting: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dfa:
    """A deterministic automaton; state 0 is the start. N states, B columns, A symbols."""

    table: NDArray[np.int32]  # [N, B], the next state, -1 for none
    column: NDArray[np.int32]  # [A], the column of every symbol
    accepting: NDArray[np.bool_]  # [N]

    def __len__(self) -> int:
        return len(self.table)

    def edges(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Source and target of every transition, one for each column that has it."""
        source, column = np.nonzero(self.table >= 0)
        return source.astype(np.int32), self.table[source, column]

    def accepts(self, symbols: Iterable[int]) -> bool:
        """Whether it accepts a whole sequence, for instance of bytes."""
        state = 0
        for symbol in symbols:
            state = int(self.table[state, self.column[symbol]])
            if state < 0:
                return False
        return bool(self.accepting[state])

    def is_empty(self) -> bool:
        """Whether it accepts nothing; of an automaton that ``minimised`` returned."""
        return not self.accepting.any()


def determinised(
    start: State, moves: Callable[[State], Moves[State]], *, symbols: int, max_states: int
) -> Dfa:
    """The deterministic automaton of a nondeterministic one, by subset construction.

    Args:
        start: its start state.
        moves: what a state can do; asked once a state.
        symbols: size of the alphabet.
        max_states: of the result.

    Raises:
        AutomatonError: the result would have more states, or takes too much work to find.
    """
    known: dict[State, Moves[State]] = {}
    number: dict[frozenset[State], int] = {frozenset({start}): 0}
    pending = [frozenset({start})]
    rows: list[list[tuple[int, int, int]]] = []
    accepting: list[bool] = []
    work = 0
    for members in pending:
        edges: list[tuple[int, int, State]] = []
        accepts = False
        for member in members:
            if member not in known:
                known[member] = moves(member)
            edges.extend(known[member].edges)
            accepts = accepts or known[member].accepting
        work += len(edges)
        if work > max_states * _WORK_PER_STATE:
            raise AutomatonError(
                "The constraint can be read in too many ways at once. Make its parts differ in how "
                "they begin, or lower its bounds."
            )
        row = []
        for first, last, targets in _apart(edges):
            if targets not in number:
                if len(number) == max_states:
                    raise AutomatonError(
                        f"The constraint needs more than {max_states} states. Shorten its bounds "
                        "(maxLength, maxItems, {m,n}), or split it."
                    )
                number[targets] = len(number)
                pending.append(targets)
            row.append((first, last, number[targets]))
        rows.append(row)
        accepting.append(accepts)
    return _tabulated(rows, accepting, symbols)


def minimised(dfa: Dfa) -> Dfa:
    """The smallest automaton of the same language; one state without edges if that is empty."""
    goal = distances(*dfa.edges(), dfa.accepting)
    starts = np.zeros(len(dfa), dtype=bool)
    starts[0] = True
    keep = (goal >= 0) & reachable(*dfa.edges(), starts)
    keep[0] = True
    dfa = _restricted(dfa, keep)
    # Equal languages have equal shortest words: a partition to begin with that saves most rounds.
    colour = _coarsest(dfa, goal[keep] * 2 + dfa.accepting)
    order, representative = np.unique(colour, return_index=True)
    # The block of the start first, the others in order of first appearance.
    rank = np.empty(len(order), dtype=np.int32)
    rank[np.argsort(representative, kind="stable")] = np.arange(len(order), dtype=np.int32)
    block = rank[np.searchsorted(order, colour)]
    first = np.sort(representative)
    table = np.append(block, np.int32(-1))[dfa.table[first]]
    return _fewer_columns(Dfa(table=table, column=dfa.column, accepting=dfa.accepting[first]))


def _apart(
    edges: list[tuple[int, int, State]],
) -> Iterator[tuple[int, int, frozenset[State]]]:
    """Ranges of symbols that do not overlap, each with every state that it leads to."""
    edges.sort(key=lambda edge: edge[:2])
    if all(edge[1] < behind[0] for edge, behind in pairwise(edges)):
        yield from ((first, last, frozenset({target})) for first, last, target in edges)
        return
    cuts = sorted({edge[0] for edge in edges} | {edge[1] + 1 for edge in edges})
    opened = 0
    active: list[tuple[int, int, State]] = []
    for first, behind in pairwise(cuts):
        active = [edge for edge in active if edge[1] >= first]
        while opened < len(edges) and edges[opened][0] == first:
            active.append(edges[opened])
            opened += 1
        if active:
            yield first, behind - 1, frozenset(edge[2] for edge in active)


def _tabulated(rows: list[list[tuple[int, int, int]]], accepting: list[bool], symbols: int) -> Dfa:
    cuts = {0, *(edge[0] for row in rows for edge in row), *(e[1] + 1 for row in rows for e in row)}
    borders = np.array(sorted(cuts | {symbols}))
    column = np.repeat(np.arange(len(borders) - 1, dtype=np.int32), np.diff(borders))
    behind = np.append(column, np.int32(len(borders) - 1)).tolist()
    table = np.full((len(rows), len(borders) - 1), -1, dtype=np.int32)
    for state, row in enumerate(rows):
        for first, last, target in row:
            table[state, behind[first] : behind[last + 1]] = target
    return _fewer_columns(Dfa(table=table, column=column, accepting=np.array(accepting)))


def _fewer_columns(dfa: Dfa) -> Dfa:
    """The same, equal columns merged."""
    number: dict[bytes, int] = {}
    columns = np.ascontiguousarray(dfa.table.T)
    merged = np.array(
        [number.setdefault(c.tobytes(), len(number)) for c in columns], dtype=np.int32
    )
    _, first = np.unique(merged, return_index=True)
    return Dfa(
        table=np.ascontiguousarray(dfa.table[:, first]),
        column=merged[dfa.column],
        accepting=dfa.accepting,
    )


def _restricted(dfa: Dfa, keep: NDArray[np.bool_]) -> Dfa:
    """The automaton of some of the states; edges into others are dropped."""
    number = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)
    table = np.append(number, np.int32(-1))[dfa.table[keep]]
    return Dfa(table=table, column=dfa.column, accepting=dfa.accepting[keep])


def _coarsest(dfa: Dfa, start: NDArray[np.integer]) -> NDArray[np.int64]:
    """Colours of the states such that two are equal exactly where the languages are. [N].

    Partition refinement (Moore), where a round looks only at the states before those whose colour
    has changed (Hopcroft). The colours behind a state are compared by a random 64-bit linear hash.
    """
    num_states, width = dfa.table.shape
    _, colours_of = np.unique(start, return_inverse=True)
    colour = np.append(colours_of, -1)  # what -1 in the table looks up
    rng = np.random.default_rng(0)
    code = rng.integers(1 << 63, size=2 * num_states + 2, dtype=np.uint64)
    weight = rng.integers(1 << 63, size=width, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    before = Predecessors(*dfa.edges(), num_states)
    behind = np.zeros(num_states, dtype=np.uint64)
    colours = int(colour.max()) + 1
    affected = np.arange(num_states)
    while len(affected):
        behind[affected] = (code[colour[dfa.table[affected]]] * weight).sum(axis=1)
        touched = np.zeros(colours + 1, dtype=bool)
        touched[colour[affected]] = True
        members = np.flatnonzero(touched[colour[:-1]])
        changed = _split(colour, members, behind, colours)
        colours = max(colours, int(colour.max()) + 1)
        affected = np.unique(before.of(changed.astype(np.int32)))
    return colour[:-1]


def _split(
    colour: NDArray[np.int64],
    members: NDArray[np.int64],
    behind: NDArray[np.uint64],
    colours: int,
) -> NDArray[np.int64]:
    """Give members of one colour with other hashes new colours, in place; who got one. [M].

    The largest part of a colour keeps it: this bounds the work by N log N.
    """
    order = members[np.lexsort((behind[members], colour[members]))]
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (np.diff(colour[order]) != 0) | (behind[order][1:] != behind[order][:-1])
    part = np.cumsum(fresh) - 1
    size = np.bincount(part)
    owner = colour[order[fresh]]  # the colour that each part comes from
    largest = np.zeros(colours, dtype=np.int64)
    np.maximum.at(largest, owner, size)
    candidates = np.flatnonzero(size == largest[owner])
    keeper = np.full(colours, -1)
    keeper[owner[candidates]] = candidates
    renamed = keeper[owner] != np.arange(len(owner))
    name = np.where(renamed, colours + np.cumsum(renamed) - 1, owner)
    changed: NDArray[np.int64] = order[renamed[part]]
    colour[order] = name[part]
    return changed
