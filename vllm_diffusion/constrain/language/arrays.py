"""Arrays of which items are counted or told apart: contains, and uniqueItems of listed values."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from vllm_diffusion.constrain.language.syntax import EMPTY, NOTHING, Call, Choice, Node, sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MOST_IN_ANY_ORDER = 6


def containing(
    name: str,
    part: Callable[[Node, bool], Node],
    kinds: tuple[Node, Node, Node],
    *,
    matching: tuple[int, int | None],
    items: tuple[int, int | None],
) -> dict[str, Node]:
    """Rules for items some of which match; the first one is the start.

    Args:
        name: that the rules' names begin with.
        part: an item, the first one or behind another.
        kinds: an item that matches, one that does not, and one of which that does not matter.
        matching: how many match, least and most.
        items: how many there are, least and most.
    """
    match, other, either = kinds
    least, most = matching
    cap = least if most is None else most
    length = items[0] if items[1] is None else items[1]

    def rule(found: int, count: int) -> str:
        return f"{name}, {found} found of {count}"

    rules: dict[str, Node] = {}
    length = max(length, 1)  # the first item has no comma
    for count in range(length + 1):
        for found in range(min(cap, count) + 1 if count < length else cap + 1):
            done = found >= least and count >= items[0]
            options: list[Node] = [EMPTY] if done else []
            onward = min(count + 1, length)
            if items[1] is None or count < items[1]:
                first = count == 0
                if found < cap:
                    more = Call(rule(found + 1, onward))
                    options.append(sequence(part(match, first), more))
                same = Call(rule(found, onward))
                if found < cap or most is None:
                    plain = other if most is not None else either
                    options.append(sequence(part(plain, first), same))
                elif most is not None:
                    options.append(sequence(part(other, first), same))
            rules[rule(found, count)] = Choice(tuple(options))
    return rules


def distinct(
    name: str, values: list[Node], part: Callable[[Node, bool], Node], least: int, most: int | None
) -> dict[str, Node]:
    """Rules for items out of some values, none twice; the first one is the start.

    In any order where they are few, else in theirs.
    """
    most = len(values) if most is None else min(most, len(values))
    if least > most:
        return {name: NOTHING}
    if len(values) > _MOST_IN_ANY_ORDER:
        return _ascending(name, values, part, least, most)
    rules: dict[str, Node] = {}
    for used in _subsets(len(values), most):
        options: list[Node] = [EMPTY] if len(used) >= least else []
        if len(used) < most:
            options += [
                sequence(part(value, not used), Call(f"{name}, {sorted({*used, index})}"))
                for index, value in enumerate(values)
                if index not in used
            ]
        rules[f"{name}, {sorted(used)}"] = Choice(tuple(options))
    return rules


def _ascending(
    name: str, values: list[Node], part: Callable[[Node, bool], Node], least: int, most: int
) -> dict[str, Node]:
    cap = most if most < len(values) else max(least, 1)
    rules: dict[str, Node] = {}
    for index in range(len(values) + 1):
        for count in range(min(index, cap) + 1):
            options: list[Node] = [EMPTY] if count >= least and index == len(values) else []
            if index < len(values):
                options.append(Call(f"{name}, {index + 1} seen, {count} there"))
                if count < most:
                    onward = f"{name}, {index + 1} seen, {min(count + 1, cap)} there"
                    options.append(sequence(part(values[index], count == 0), Call(onward)))
            rules[f"{name}, {index} seen, {count} there"] = Choice(tuple(options))
    return rules


def _subsets(size: int, most: int) -> Iterator[tuple[int, ...]]:
    for count in range(most + 1):
        yield from combinations(range(size), count)
