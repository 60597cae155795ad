"""Automaton over bytes and a vocabulary -> automaton over classes of tokens.

A token takes every state to another one or to nowhere: a column of N next states. Tokens of equal
columns are one class. Columns are found for all states at once along the trie, a level at a time,
and a step from a column by a byte is taken once, however many nodes of the trie take it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vllm_diffusion.constrain.automaton.graph import Ints, distances, reachable
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from vllm_diffusion.constrain.automaton.dfa import Dfa
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary

NOWHERE = 0  # the class of tokens that no state reads

# While the trie is walked there are columns of texts that no token ends with.
_PREFIXES_PER_CLASS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How large an automaton may become; a larger one is left to a parser."""

    states: int = 1 << 14
    classes: int = 2048
    edges: int = 1 << 19
    depth: int = 8  # of rules that embed themselves, as deep as the other limits let it
    # What is deeper than it must be is no larger than this: it doubles with every level.
    deep_states: int = 1 << 13
    deep_edges: int = 1 << 17


def token_automaton(
    dfa: Dfa,
    vocabulary: Vocabulary,
    *,
    end_ids: Sequence[int],
    limits: Limits,
) -> TokenAutomaton:
    """Which sequences of tokens write a text that an automaton accepts.

    Args:
        dfa: minimal, over bytes.
        vocabulary: what the tokens write.
        end_ids: tokens that end a text, whatever they would write; at least one.
        limits: on the size of the result.

    Raises:
        ConstraintError: nothing satisfies it.
        AutomatonError: it is larger than the limits.
    """
    class_of, columns = _columns(dfa, vocabulary, limits)
    ends = list(end_ids)
    class_of[ends] = NOWHERE

    live = _live(dfa, columns[np.unique(class_of)])
    if not live[0]:
        raise ConstraintError(
            "Nothing satisfies the constraint."
            if dfa.is_empty()
            else "No sequence of tokens of the vocabulary satisfies the constraint."
        )
    number = np.append(np.where(live, np.cumsum(live) - 1, -1), -1).astype(np.int32)
    class_of, columns = _merged(class_of, number[columns[:, live]])
    accepting = dfa.accepting[live]
    count, end = columns.shape
    class_of[ends] = count
    columns = np.vstack([columns, np.where(accepting, end, -1).astype(np.int32)])
    return _record(class_of, columns, accepting, limits)


def _columns(
    dfa: Dfa, vocabulary: Vocabulary, limits: Limits
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The column of every token: [V], and the columns: [C, N], -1 for nowhere."""
    num_states = len(dfa)
    if num_states > limits.states:
        raise AutomatonError(_too_large("states", num_states, limits.states))
    step = np.vstack([dfa.table, np.full((1, dfa.table.shape[1]), -1, dtype=np.int32)])
    width = step.shape[1]
    columns = [np.full(num_states, -1, dtype=np.int32), np.arange(num_states, dtype=np.int32)]
    number = {column.tobytes(): index for index, column in enumerate(columns)}
    after: dict[int, int] = {}  # column before and byte -> column behind
    column_of = np.zeros(len(vocabulary.parent), dtype=np.int64)
    column_of[0] = 1
    for first, behind in pairwise(vocabulary.levels[1:].tolist()):
        before = column_of[vocabulary.parent[first:behind]]
        steps = before * width + dfa.column[vocabulary.byte[first:behind]]
        unique, inverse = np.unique(np.where(before == NOWHERE, -1, steps), return_inverse=True)
        found = np.empty(len(unique), dtype=np.int64)
        for index, key in enumerate(unique.tolist()):
            if key < 0:
                found[index] = NOWHERE
                continue
            if key not in after:
                column = step[columns[key // width], key % width]
                after[key] = number.setdefault(column.tobytes(), len(number))
                if after[key] == len(columns):
                    columns.append(column)
            found[index] = after[key]
        column_of[first:behind] = found[inverse]
        if len(columns) > limits.classes * _PREFIXES_PER_CLASS:
            raise AutomatonError(_too_large("token classes", len(columns), limits.classes))
    class_of = np.where(vocabulary.node > 0, column_of[vocabulary.node], NOWHERE)
    return _merged(class_of, np.stack(columns))


def _merged(
    class_of: NDArray[np.integer], columns: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The same, equal columns merged and unused ones dropped; class 0 leads nowhere."""
    used = np.unique(class_of)
    number = {np.full(columns.shape[1], -1, dtype=np.int32).tobytes(): NOWHERE}
    renamed = np.zeros(len(columns), dtype=np.int32)
    for index in used.tolist():
        renamed[index] = number.setdefault(columns[index].tobytes(), len(number))
    merged = np.stack([np.frombuffer(column, dtype=np.int32) for column in number])
    return renamed[class_of], merged


def _live(dfa: Dfa, columns: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The states that tokens lead to and that tokens complete a text from. [N]."""
    source, _, target = _edges(columns)
    starts = np.zeros(len(dfa), dtype=bool)
    starts[0] = True
    return (distances(source, target, dfa.accepting) >= 0) & reachable(source, target, starts)


def _record(
    class_of: NDArray[np.int32],
    columns: NDArray[np.int32],
    accepting: NDArray[np.bool_],
    limits: Limits,
) -> TokenAutomaton:
    """The record of an automaton whose columns lead to an end behind all other states."""
    num_classes, num_states = len(columns), len(accepting) + 1
    source, symbol, target = _edges(columns)
    for name, value, most in (
        ("token classes", num_classes, limits.classes),
        ("edges", len(source), limits.edges),
    ):
        if value > most:
            raise AutomatonError(_too_large(name, value, most))
    accepting = np.append(accepting, True)
    return TokenAutomaton(
        class_of=class_of,
        num_classes=num_classes,
        source=source,
        symbol=symbol,
        target=target,
        num_states=num_states,
        start=0,
        accepting=accepting,
        distance=distances(source, target, accepting),
    )


def _edges(columns: NDArray[np.int32]) -> tuple[Ints, Ints, Ints]:
    """Source, symbol and target of every transition, in this order."""
    table = np.ascontiguousarray(columns.T)
    source, symbol = np.nonzero(table >= 0)
    return source.astype(np.int32), symbol.astype(np.int32), table[source, symbol]


def _too_large(what: str, found: int, most: int) -> str:
    return (
        f"The constraint needs {found} {what}, more than the {most} that an automaton may have. "
        "Shorten its bounds (maxLength, maxItems, {m,n}), name fewer properties, or split it."
    )
