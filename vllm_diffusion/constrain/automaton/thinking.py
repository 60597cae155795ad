"""A constraint that begins behind a block of free thinking.

Takes an automaton and the tokens that begin and end thinking. Gives an automaton of: the token that
opens the thinking, any tokens but a few, the token that ends it, then a text of the constraint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinking:
    """How a request thinks, before its constraint begins."""

    until: int
    """Id of the token that ends it."""
    begin: int | None = None
    """Id of the token that opens it, the first of all; None: the prompt has opened it."""
    forbidden: tuple[int, ...] = ()
    """Other ids that cannot stand in it."""

    @property
    def tokens(self) -> int:
        """How many it takes at least."""
        return 1 + (self.begin is not None)


def behind_thinking(
    automaton: TokenAutomaton, thinking: Thinking, *, end_ids: Iterable[int] = ()
) -> TokenAutomaton:
    """The automaton of thinking, followed by a text of the constraint.

    It has one or two states more. Only ``until`` ends the thinking, so a request that thinks until
    its last few tokens still ends with a complete text.

    Args:
        automaton: of the text behind the thinking.
        thinking: how it begins and ends.
        end_ids: ids that end a text, and cannot stand in the thinking.
    """
    until = thinking.until
    behind = _behind(automaton, until, (*end_ids, *thinking.forbidden))
    return behind if thinking.begin is None else _behind_one(behind, thinking.begin)


def _behind(automaton: TokenAutomaton, until: int, forbidden: Iterable[int]) -> TokenAutomaton:
    """The automaton behind all tokens but those forbidden up to and with one."""
    classes, until_class, others = _classes(automaton, until, forbidden)
    class_of, num_classes, origin = classes
    # A class that was split reads what it read before, in every state.
    copies = [np.flatnonzero(automaton.symbol == old) for old in origin]
    edges = [
        (automaton.source[at], np.full(len(at), new, np.int32), automaton.target[at])
        for new, at in enumerate(copies)
    ]
    # The end stays the last state, so the new one takes its number.
    thinking, end = automaton.num_states - 1, automaton.num_states
    loops = np.array(sorted(others), dtype=np.int32)
    edges.append((np.full(len(loops), thinking), loops, np.full(len(loops), thinking)))
    source, symbol, target = (np.concatenate(each) for each in zip(*edges, strict=True))
    moved = np.where(target == automaton.end, end, target)
    moved[source == thinking] = thinking
    leave = np.array([thinking]), np.array([until_class]), np.array([automaton.start])
    source, symbol, target = (
        np.concatenate([mine, one]).astype(np.int32)
        for mine, one in zip((source, symbol, moved), leave, strict=True)
    )
    order = np.lexsort((symbol, source))
    distance = automaton.distance
    return replace(
        automaton,
        class_of=class_of,
        num_classes=num_classes,
        source=source[order],
        symbol=symbol[order],
        target=target[order],
        num_states=automaton.num_states + 1,
        start=thinking,
        accepting=np.insert(automaton.accepting, thinking, False),
        distance=np.insert(distance, thinking, distance[automaton.start] + 1),
    )


def _behind_one(automaton: TokenAutomaton, token: int) -> TokenAutomaton:
    """The automaton behind one token."""
    old = int(automaton.class_of[token])
    alone = old != 0 and int((automaton.class_of == old).sum()) == 1
    symbol = old if alone else automaton.num_classes
    class_of = automaton.class_of.copy()
    class_of[token] = symbol
    # Alone in its class it reads what it read before, in every state.
    copied = np.flatnonzero(automaton.symbol == old) if not alone else np.empty(0, np.int64)
    # The end stays the last state, so the new one takes its number.
    first, end = automaton.num_states - 1, automaton.num_states
    source = np.concatenate([automaton.source, automaton.source[copied], [first]])
    symbols = np.concatenate([automaton.symbol, np.full(len(copied), symbol), [symbol]])
    target = np.concatenate([automaton.target, automaton.target[copied]])
    target = np.append(np.where(target == automaton.end, end, target), automaton.start)
    order = np.lexsort((symbols, source))
    return replace(
        automaton,
        class_of=class_of,
        num_classes=automaton.num_classes + (not alone),
        source=source[order].astype(np.int32),
        symbol=symbols[order].astype(np.int32),
        target=target[order].astype(np.int32),
        num_states=automaton.num_states + 1,
        start=first,
        accepting=np.insert(automaton.accepting, first, False),
        distance=np.insert(automaton.distance, first, automaton.distance[automaton.start] + 1),
    )


def _classes(
    automaton: TokenAutomaton, until: int, forbidden: Iterable[int]
) -> tuple[tuple[np.ndarray, int, list[int]], int, set[int]]:
    """Classes that tell thinking tokens, ``until`` and forbidden ones apart.

    Returns:
        class of every token, number of classes, and the old class that each new one is part of;
        the class of ``until``; the classes of thinking tokens.
    """
    kind = np.zeros(len(automaton.class_of), dtype=np.int64)
    kind[[token for token in forbidden if token < len(kind)]] = 1
    kind[until] = 2
    pairs = automaton.class_of.astype(np.int64) * 3 + kind
    # Class 0 stays that of tokens which no state reads: now the forbidden ones of it alone.
    kept = np.unique(np.concatenate([[1], pairs]))
    kept = np.concatenate([[1], kept[kept != 1]])
    number = np.zeros(automaton.num_classes * 3, dtype=np.int32)
    number[kept] = np.arange(len(kept))
    others = {int(number[pair]) for pair in kept if pair % 3 == 0}
    class_of = number[pairs]
    origin = [int(pair // 3) for pair in kept]
    return (class_of, len(kept), origin), int(class_of[until]), others
