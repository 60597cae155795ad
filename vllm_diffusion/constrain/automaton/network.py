"""Rules -> one deterministic automaton over bytes, recursion followed to a depth.

Recursive transition networks (Woods 1970). Every call of a rule is expanded in place, with what
follows the call as its exit. A call that is the last thing a rule does has the exit of its caller:
expanded once, it closes a loop, so right recursion costs no depth and stays unbounded. A call
inside an expansion of the same rule is self-embedding. It becomes an edge of the network, labelled
with the rule, and the rule a network of its own. Networks are made deterministic and minimal with
such edges as symbols, which merges places that differ only in how they were written. At last the
edges are followed with a stack of return places that is bounded: what is nested deeper is refused.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from vllm_diffusion.constrain.automaton.dfa import Dfa, Moves, determinised, minimised
from vllm_diffusion.constrain.language.literals import acyclic, told_apart
from vllm_diffusion.constrain.language.syntax import (
    Call,
    Chars,
    Choice,
    Grammar,
    Node,
    Repeat,
    Sequence,
    Text,
    without_left_recursion,
)
from vllm_diffusion.constrain.language.utf8 import spellings
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping

BYTES = 256

# Of a network before subset construction: places that read nothing are many and cheap.
_PLACES_PER_STATE = 16
# Before states are merged: a list of many values has one for every beginning of each.
_STATES_PER_STATE = 4

Stack = tuple[int, int, "Stack"] | None  # its height, where to go on, what lies below
Place = tuple[int, Stack]  # a state of the joined networks, and what to do when its rule is done


class Networks:
    """The networks of a grammar: of its root, and of every rule that embeds itself.

    Raises ConstraintError for a rule that is called and not there, AutomatonError for rules that
    begin with themselves through others, and for networks far larger than ``max_states``, which
    bounds the automaton.
    """

    def __init__(self, grammar: Grammar, *, max_states: int) -> None:
        rules = without_left_recursion(grammar.rules)
        most = max_states * _PLACES_PER_STATE
        self._max_states = max_states
        drafts = [_Draft(rules, grammar.root, most)]
        names = [grammar.root]
        embedded: list[str] = []  # their networks come behind the root's
        for draft in drafts:
            for rule in draft.calls:
                if rule not in embedded:
                    embedded.append(rule)
                    drafts.append(_Draft(rules, rule, most))
        names += embedded
        symbol = {rule: BYTES + index for index, rule in enumerate(embedded)}
        self._networks = [
            minimised(
                determinised(
                    draft.start,
                    partial(draft.moves, symbol=symbol),
                    symbols=BYTES + len(symbol),
                    max_states=max_states * _STATES_PER_STATE,
                )
            )
            for draft in drafts
        ]
        if self.recursive:
            self._join()
            self._refuse_left_recursion(names)

    @property
    def recursive(self) -> bool:
        """Whether some rule embeds itself: then a depth limits what is accepted."""
        return len(self._networks) > 1

    def automaton(self, depth: int) -> Dfa:
        """The minimal automaton over bytes of what nests at most ``depth`` calls.

        Raises AutomatonError where it has too many states.
        """
        if not self.recursive:
            return self._networks[0]
        start: Place = (0, None)
        moves = partial(self._moves, depth=depth)
        return minimised(determinised(start, moves, symbols=BYTES, max_states=self._max_states))

    def _join(self) -> None:
        """Lists by state, the states of all networks numbered through."""
        self._edges: list[list[tuple[int, int, int]]] = []
        self._calls: list[list[tuple[int, int]]] = []  # first state of a network, state behind
        self._accepting: list[bool] = []
        self._starts = np.cumsum([0, *map(len, self._networks)])[:-1].tolist()
        for start, network in zip(self._starts, self._networks, strict=True):
            full = network.table[:, network.column]
            for row, accepts in zip(full, network.accepting.tolist(), strict=True):
                borders = np.flatnonzero(np.diff(row[:BYTES], prepend=-2, append=-2)).tolist()
                self._edges.append(
                    [
                        (first, behind - 1, start + int(row[first]))
                        for first, behind in pairwise(borders)
                        if row[first] >= 0
                    ]
                )
                self._calls.append(
                    [
                        (self._starts[1 + index], start + behind)
                        for index, behind in enumerate(row[BYTES:].tolist())
                        if behind >= 0
                    ]
                )
                self._accepting.append(accepts)

    def _moves(self, place: Place, *, depth: int) -> Moves[Place]:
        edges: list[tuple[int, int, Place]] = []
        accepting = False
        pending, seen = [place], {place}
        for state, stack in pending:
            edges.extend((first, last, (to, stack)) for first, last, to in self._edges[state])
            silent: list[Place] = []
            height = stack[0] if stack else 0
            if height < depth:
                silent += [(to, (height + 1, back, stack)) for to, back in self._calls[state]]
            if self._accepting[state]:
                accepting = accepting or stack is None
                silent += [] if stack is None else [(stack[1], stack[2])]
            pending += [other for other in silent if other not in seen]
            seen.update(silent)
        return Moves(tuple(edges), accepting)

    def _refuse_left_recursion(self, names: list[str]) -> None:
        """A rule that calls itself before anything is read would use up the depth on nothing."""
        network = {start: index for index, start in enumerate(self._starts)}
        first = [{network[called] for called, _ in self._calls[start]} for start in self._starts]
        for index in range(len(first)):
            found = set(first[index])
            pending = list(found)
            for other in pending:
                pending += first[other] - found
                found |= first[other]
            if index in found:
                raise AutomatonError(
                    f"Rule {names[index]!r} begins with itself through other rules. Write it so "
                    "that something is read before it comes again, as in: a ::= b | b a."
                )


class _Draft:
    """The nondeterministic network of one rule: places, what they read, and what they call."""

    def __init__(self, rules: Mapping[str, Node], rule: str, most: int) -> None:
        self._rules = rules
        self._most = most
        self._edges: list[list[tuple[int, int, int]]] = []
        self._silent: list[list[int]] = []
        self._called: list[list[tuple[str, int]]] = []
        self._shared: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        self._entries: dict[tuple[str, int], int] = {}
        self._pending: list[tuple[str, int, int, frozenset[str]]] = []
        self._final = self._place()
        self.start = self._rule(rule, self._final, frozenset({rule}))
        while self._pending:
            name, entry, end, open_rules = self._pending.pop()
            self._silent[entry].append(self._node(rules[name], end, open_rules))

    @property
    def calls(self) -> list[str]:
        """The rules that it calls without expanding them, in order of first appearance."""
        return list(dict.fromkeys(rule for called in self._called for rule, _ in called))

    def moves(self, place: int, *, symbol: Mapping[str, int]) -> Moves[int]:
        """What a place can do; a call is a step by the rule's symbol."""
        edges: list[tuple[int, int, int]] = []
        pending, seen = [place], {place}
        for here in pending:
            edges += self._edges[here]
            edges += [(symbol[rule], symbol[rule], to) for rule, to in self._called[here]]
            silent = [other for other in self._silent[here] if other not in seen]
            pending += silent
            seen.update(silent)
        return Moves(tuple(edges), self._final in seen)

    def _place(self) -> int:
        if len(self._edges) == self._most:
            raise AutomatonError(
                f"The constraint needs more than {self._most} places before they are merged. "
                "Shorten its bounds (maxLength, maxItems, {m,n}), or split it."
            )
        self._edges.append([])
        self._silent.append([])
        self._called.append([])
        return len(self._edges) - 1

    def _rule(self, name: str, end: int, open_rules: frozenset[str]) -> int:
        """Entry of an expansion of a rule that goes on at ``end``; its body is drawn later."""
        if name not in self._rules:
            raise ConstraintError(
                f"The constraint refers to the rule {name!r}, which is not there."
            )
        if (name, end) not in self._entries:
            self._entries[name, end] = self._place()
            self._pending.append((name, self._entries[name, end], end, open_rules))
        return self._entries[name, end]

    def _node(self, node: Node, end: int, open_rules: frozenset[str]) -> int:
        """Entry of a node that goes on at ``end``, inside the expansions of ``open_rules``."""
        match node:
            case Text(value):
                for byte in reversed(value):
                    end = self._reading((byte, byte), end)
                return end
            case Chars(ranges):
                return self._chars(ranges, end)
            case Sequence(parts):
                for part in reversed(parts):
                    end = self._node(part, end, open_rules)
                return end
            case Choice():
                return self._choice(node, end, open_rules)
            case Repeat():
                return self._repeat(node, end, open_rules)
            case Call(rule):
                if rule in open_rules and (rule, end) not in self._entries:
                    entry = self._place()
                    self._called[entry].append((rule, end))
                    return entry
                return self._rule(rule, end, open_rules | {rule})

    def _choice(self, node: Choice, end: int, open_rules: frozenset[str]) -> int:
        """Fixed texts share beginnings and ends: a list of thousands is no more than it needs."""
        entry = self._place()
        texts, others = told_apart(node)
        if texts:
            places: list[int] = []
            for edges, final in acyclic(texts):
                places.append(self._place())
                self._edges[-1] += [(byte, byte, places[to]) for byte, to in edges]
                self._silent[-1] += [end] * final
            self._silent[entry].append(places[-1])
        for option in others:
            self._silent[entry].append(self._node(option, end, open_rules))
        return entry

    def _repeat(self, node: Repeat, end: int, open_rules: frozenset[str]) -> int:
        if node.most is None:
            loop = self._place()
            self._silent[loop] += [end, self._node(node.part, loop, open_rules)]
            entry = loop
        else:
            entry = end if node.least <= node.most else self._place()  # a place without a way on
            for _ in range(node.most - node.least):
                skip = self._place()
                self._silent[skip] += [end, self._node(node.part, entry, open_rules)]
                entry = skip
        for _ in range(node.least):
            behind, entry = entry, self._node(node.part, entry, open_rules)
            if entry == behind:  # a part that reads nothing, however often
                break
        return entry

    def _chars(self, ranges: tuple[tuple[int, int], ...], end: int) -> int:
        """Characters share the places of equal last bytes, which keeps large sets small."""
        entry = self._place()
        for first, last in ranges:
            for head, *tail in spellings(first, last):
                to = end
                for position in reversed(range(len(tail))):
                    key = (end, tuple(tail[position:]))
                    if key not in self._shared:
                        self._shared[key] = self._reading(tail[position], to)
                    to = self._shared[key]
                self._edges[entry].append((*head, to))
        return entry

    def _reading(self, span: tuple[int, int], end: int) -> int:
        place = self._place()
        self._edges[place].append((*span, end))
        return place
