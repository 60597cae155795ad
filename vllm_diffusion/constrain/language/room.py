"""What of a grammar matters to a text of limited length.

Takes a grammar and the bytes that a request may write at most. Bounds that no such text reaches are
none, so that a ``maxLength`` of half a million costs no more than none, and what is asked for at
least and does not fit is known before anything is compiled.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf
from typing import TYPE_CHECKING

from vllm_diffusion.constrain.language.syntax import (
    NOTHING,
    Call,
    Chars,
    Choice,
    Grammar,
    Node,
    Repeat,
    Sequence,
    Text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping


def shortest(grammar: Grammar) -> int | None:
    """Bytes of the shortest text that a grammar reads; None: it reads none."""
    length = lengths(grammar)[grammar.root]
    return None if length == inf else int(length)


def fitting(grammar: Grammar, room: int | None) -> Grammar:
    """A grammar for texts of at most ``room`` bytes, see ``within``; None: of any length.

    Raises:
        ConstraintError: its shortest text is longer.
    """
    if room is None:
        return grammar
    least = shortest(grammar)
    if least is not None and least > room:
        raise ConstraintError(
            f"the shortest text of the constraint has {least} bytes, more than the tokens that "
            "max_tokens and max_model_len leave can write"
        )
    return within(grammar, room)


def within(grammar: Grammar, room: int) -> Grammar:
    """The same texts as far as they have at most ``room`` bytes, and perhaps longer ones."""
    fewest = lengths(grammar)

    def node(old: Node) -> Node:
        match old:
            case Sequence(parts):
                return Sequence(tuple(map(node, parts)))
            case Choice(options):
                return Choice(tuple(map(node, options)))
            case Repeat(part, least, most):
                # Parts without text need not be counted: fewer of them read the same.
                times = room // max(_shortest(part, fewest), 1)
                if least > times and _shortest(part, fewest) > 0:
                    return NOTHING
                most = None if most is not None and most >= max(times, least) else most
                return Repeat(node(part), least, most)
        return old

    return Grammar({name: node(body) for name, body in grammar.rules.items()}, grammar.root)


def lengths(grammar: Grammar) -> dict[str, float]:
    """Bytes of the shortest text of every rule; inf: there is none.

    A rule is looked at again where what it calls has become shorter.
    """
    callers: dict[str, set[str]] = {}
    for name, body in grammar.rules.items():
        for called in _called(body):
            callers.setdefault(called, set()).add(name)
    fewest = dict.fromkeys(grammar.rules, inf)
    pending: list[tuple[float, str]] = []
    settled: set[str] = set()
    for name, body in grammar.rules.items():
        fewest[name] = _shortest(body, fewest)
        if fewest[name] < inf:
            heappush(pending, (fewest[name], name))
    while pending:  # Knuth 1977: what is shortest of all can become no shorter
        _, name = heappop(pending)
        if name in settled:
            continue
        settled.add(name)
        for caller in callers.get(name, ()):
            length = _shortest(grammar.rules[caller], fewest)
            if length < fewest[caller]:
                fewest[caller] = length
                heappush(pending, (length, caller))
    return fewest


def _called(node: Node) -> set[str]:
    found: set[str] = set()
    pending = [node]
    for part in pending:
        match part:
            case Call(rule):
                found.add(rule)
            case Sequence(parts):
                pending += parts
            case Choice(options):
                pending += options
            case Repeat(inner, _, _):
                pending.append(inner)
    return found


def _shortest(node: Node, lengths: Mapping[str, float]) -> float:
    match node:
        case Text(value):
            return len(value)
        case Chars(ranges):
            return len(chr(ranges[0][0]).encode(errors="surrogatepass")) if ranges else inf
        case Sequence(parts):
            return sum(_shortest(part, lengths) for part in parts)
        case Choice(options):
            return min((_shortest(option, lengths) for option in options), default=inf)
        case Repeat(part, least, most):
            if most is not None and least > most:
                return inf
            return least * _shortest(part, lengths) if least else 0
        case Call(rule):
            return lengths.get(rule, inf)
