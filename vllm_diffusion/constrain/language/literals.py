"""Many fixed texts -> the smallest acyclic automaton that reads exactly these.

Daciuk et al., Incremental construction of minimal acyclic finite-state automata (2000), of sorted
words: what lies behind the last word's path is final and looked up among what is known.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from vllm_diffusion.constrain.language.syntax import Chars, Choice, Node, Sequence, Text

if TYPE_CHECKING:
    import collections.abc
    from collections.abc import Iterable, Iterator

State = tuple[tuple[tuple[int, int], ...], bool]
"""Edges, a symbol and the number of the state behind it, and whether a word may end here."""


def acyclic(words: Iterable[collections.abc.Sequence[int]]) -> list[State]:
    """The states of an automaton; each leads to lower numbers only, and the last is the start.

    Args:
        words: of bytes, or of any other numbers.
    """
    states: list[State] = []
    known: dict[State, int] = {}
    # Along the last word: the symbol that leads to a state, and its edges so far; where words end.
    path: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    ends = [False]

    def close(depth: int) -> None:
        while len(path) > depth + 1:
            symbol, edges = path.pop()
            state = tuple(edges), ends.pop()
            number = known.setdefault(state, len(states))
            if number == len(states):
                states.append(state)
            path[-1][1].append((symbol, number))

    last: tuple[int, ...] = ()
    for word in sorted(set(map(tuple, words))):
        shared = next(
            (at for at, (one, other) in enumerate(zip(last, word, strict=False)) if one != other),
            min(len(last), len(word)),
        )
        close(shared)
        path += [(symbol, []) for symbol in word[shared:]]
        ends += [False] * (len(word) - shared)
        ends[-1] = True
        last = word
    close(0)
    return [*states, (tuple(path[0][1]), ends[0])]


def told_apart(choice: Choice) -> tuple[list[bytes], list[Node]]:
    """The options of a choice, and of choices in it, that are fixed texts; and the others."""
    texts: list[bytes] = []
    others: list[Node] = []
    for option in _flat(choice):
        text = _fixed(option)
        if text is None:
            others.append(option)
        else:
            texts.append(text)
    return texts, others


def _flat(choice: Choice) -> Iterator[Node]:
    for option in choice.options:
        if isinstance(option, Choice):
            yield from _flat(option)
        else:
            yield option


def _fixed(node: Node) -> bytes | None:
    """The one text that a node reads, where that is plain."""
    match node:
        case Text(value):
            return value
        case Chars(((first, last),)) if first == last:
            with suppress(UnicodeEncodeError):  # half of a surrogate pair reads nothing
                return chr(first).encode()
        case Sequence(parts):
            texts = []
            for part in parts:
                text = _fixed(part)
                if text is None:
                    return None
                texts.append(text)
            return b"".join(texts)
    return None
