"""Texts that several expressions ask for at once: intersections, differences, and lengths.

Takes nodes over plain characters that call no rules. Gives rules, one for every state of the
deterministic automaton over characters that all of them make together.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Protocol

from vllm_diffusion.constrain.automaton.dfa import Dfa, Moves, determinised, minimised
from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    LAST_CODE_POINT,
    Call,
    Chars,
    Choice,
    Node,
    Repeat,
    Sequence,
    Text,
    merged,
    sequence,
)
from vllm_diffusion.errors import AutomatonError, ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MOST_STATES = 1200
"""Of what expressions make together: every state becomes a rule."""


_Together = tuple[tuple[object, ...], tuple[object | None, ...], int]
"""States of what is wanted and of what is not, and characters counted."""


class Machine(Protocol):
    """A deterministic automaton that reads characters; states are hashable, None is dead."""

    start: object

    def step(self, state: object, point: int) -> object | None:
        """The state behind a character, as its code point."""

    def accepts(self, state: object) -> bool:
        """Whether the text may end."""


def intersect(
    wanted: Iterable[Node | Machine],
    unwanted: Iterable[Node] = (),
    *,
    least: int = 0,
    most: int | None = None,
    prefix: str,
    spelled: Callable[[Node], Node] = lambda node: node,
) -> dict[str, Node]:
    """Rules for the texts that all of ``wanted`` read and none of ``unwanted``.

    Args:
        wanted: expressions, or automata that tell no characters apart but digits and signs.
        unwanted: expressions.
        least: characters, at least.
        most: characters, at most.
        prefix: of the rules' names.
        spelled: what characters become in the rules.

    Returns:
        The rules; the first one is the start.

    Raises:
        ConstraintError: too many states, or expressions that call rules.
    """
    wanted, unwanted = list(wanted), list(unwanted)
    nodes = [node for node in (*wanted, *unwanted) if isinstance(node, Node)]
    letters = _letters(nodes)
    try:
        machines = [_of(each, letters) for each in wanted]
        others = [_of(each, letters) for each in unwanted]
        cap = most if most is not None else least
        start: _Together = (tuple(m.start for m in machines), tuple(m.start for m in others), 0)

        def moves(state: _Together) -> Moves[_Together]:
            ins, outs, count = state
            accepting = (
                count >= least
                and all(m.accepts(s) for m, s in zip(machines, ins, strict=True))
                and not any(
                    s is not None and m.accepts(s) for m, s in zip(others, outs, strict=True)
                )
            )
            edges = []
            for index, point in enumerate(letters) if most is None or count < most else ():
                onward = [m.step(s, point) for m, s in zip(machines, ins, strict=True)]
                if any(s is None for s in onward):
                    continue
                away = [
                    None if s is None else m.step(s, point)
                    for m, s in zip(others, outs, strict=True)
                ]
                edges.append((index, index, (tuple(onward), tuple(away), min(count + 1, cap))))
            return Moves(tuple(edges), accepting)

        dfa = minimised(
            determinised(start, moves, symbols=len(letters), max_states=4 * MOST_STATES)
        )
    except AutomatonError as error:
        raise ConstraintError("what is asked of a text together needs too many states") from error
    if len(dfa) > MOST_STATES:
        raise ConstraintError("what is asked of a text together needs too many states")
    return _rules(dfa, letters, prefix, spelled)


def _letters(nodes: Iterable[Node]) -> list[int]:
    """First code points of runs of characters that no expression tells apart; digits one by one."""
    cuts = {0, 0x2B, 0x2C, 0x2D, 0x2E, 0x2F, *range(0x30, 0x3B)}
    pending = list(nodes)
    for node in pending:
        match node:
            case Chars(ranges):
                cuts |= {first for first, _ in ranges} | {last + 1 for _, last in ranges}
            case Text(value):
                for character in value.decode():
                    cuts |= {ord(character), ord(character) + 1}
            case Sequence(parts) | Choice(parts):
                pending += parts
            case Repeat(part, _, _):
                pending.append(part)
            case Call(rule):
                raise ConstraintError(f"the rule {rule!r} cannot be combined with others")
    return sorted(cut for cut in cuts if cut <= LAST_CODE_POINT)


def _rules(
    dfa: Dfa, letters: list[int], prefix: str, spelled: Callable[[Node], Node]
) -> dict[str, Node]:
    ends = [*(first - 1 for first in letters[1:]), LAST_CODE_POINT]
    rules: dict[str, Node] = {}
    for state, row in enumerate(dfa.table[:, dfa.column].tolist()):
        runs: dict[int, list[tuple[int, int]]] = {}
        for index, target in enumerate(row):
            if target >= 0:
                runs.setdefault(target, []).append((letters[index], ends[index]))
        options: list[Node] = [EMPTY] if dfa.accepting[state] else []
        options += [
            sequence(spelled(Chars(merged(ranges))), Call(f"{prefix} {target}"))
            for target, ranges in runs.items()
        ]
        rules[f"{prefix} {state}"] = Choice(tuple(options))
    return rules


def _of(each: Node | Machine, letters: list[int]) -> Machine:
    return _Expression(each, letters) if isinstance(each, Node) else each


class _Expression:
    """The automaton of an expression over runs of characters."""

    def __init__(self, node: Node, letters: list[int]) -> None:
        self._letters = letters
        self._edges: list[list[tuple[int, int, int]]] = []
        self._silent: list[list[int]] = []
        self._final = self._place()
        start = self._node(node, self._final)
        self._dfa = determinised(
            start, self._moves, symbols=len(letters), max_states=4 * MOST_STATES
        )
        self._table = self._dfa.table[:, self._dfa.column].tolist()
        self.start: object = 0

    def step(self, state: object, point: int) -> object | None:
        """The state behind a character."""
        assert isinstance(state, int)
        target = self._table[state][bisect_right(self._letters, point) - 1]
        return None if target < 0 else target

    def accepts(self, state: object) -> bool:
        """Whether the text may end."""
        assert isinstance(state, int)
        return bool(self._dfa.accepting[state])

    def _moves(self, place: int) -> Moves[int]:
        edges: list[tuple[int, int, int]] = []
        pending, seen = [place], {place}
        for here in pending:
            edges += self._edges[here]
            silent = [other for other in self._silent[here] if other not in seen]
            pending += silent
            seen.update(silent)
        return Moves(tuple(edges), self._final in seen)

    def _place(self) -> int:
        if len(self._edges) > 16 * MOST_STATES:
            raise AutomatonError("too many places")
        self._edges.append([])
        self._silent.append([])
        return len(self._edges) - 1

    def _node(self, node: Node, end: int) -> int:
        match node:
            case Text(value):
                parts = [Chars(((ord(each), ord(each)),)) for each in value.decode()]
                return self._node(Sequence(tuple(parts)), end)
            case Chars(ranges):
                entry = self._place()
                for first, last in ranges:
                    low, high = (bisect_right(self._letters, each) - 1 for each in (first, last))
                    self._edges[entry].append((low, high, end))
                return entry
            case Sequence(parts):
                for part in reversed(parts):
                    end = self._node(part, end)
                return end
            case Choice(options):
                entry = self._place()
                for option in options:
                    self._silent[entry].append(self._node(option, end))
                return entry
            case Repeat(part, least, most):
                return self._repeat(part, least, most, end)
            case Call(_):
                raise AssertionError("was looked for before")

    def _repeat(self, part: Node, least: int, most: int | None, end: int) -> int:
        entry = self._place()
        if most is None:
            self._silent[entry] += [end, self._node(part, entry)]
        elif least <= most:
            self._silent[entry].append(end)
            for _ in range(most - least):
                skip = self._place()
                self._silent[skip] += [end, self._node(part, entry)]
                entry = skip
        for _ in range(least):
            entry = self._node(part, entry)
        return entry


class Multiples:
    """Whole numbers in digits that a number divides, without zeros in front.

    Args:
        of: at least one.
    """

    def __init__(self, of: int) -> None:
        self._of = of
        self.start: object = None, 0  # nothing read

    def step(self, state: object, point: int) -> object | None:
        """The state behind a sign or a digit."""
        assert isinstance(state, tuple)
        read, rest = state
        if point == ord("-") and read is None:
            return "sign", 0
        digit = point - ord("0")
        return ("digits", (rest * 10 + digit) % self._of) if digit in range(10) else None

    def accepts(self, state: object) -> bool:
        """Whether the digits so far are a multiple."""
        assert isinstance(state, tuple)
        read, rest = state
        return bool(read == "digits" and rest == 0)
