"""Members of objects in order, optional ones left out or not, and how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_diffusion.constrain.language.syntax import Call, Choice, Node, sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def in_order(
    name: str,
    members: Sequence[tuple[Node, bool]],
    behind: Callable[[Node], Node],
    end: Callable[[int], Node],
    *,
    span: tuple[int, int | None],
) -> dict[str, Node]:
    """Rules for members, one for each place and count; the first one is the start.

    Counts above what ``span`` asks about are not told apart.

    Args:
        name: that the rules' names begin with.
        members: each, and whether it must be there.
        behind: a member that follows another one.
        end: what may stand behind so many members.
        span: how many there are, least and most.
    """
    least, most = span
    cap = min(max(least, 1) if most is None else most, len(members))

    def rule(index: int, count: int) -> str:
        return f"{name}, member {index} behind {count}"

    rules: dict[str, Node] = {}
    for index, (member, required) in enumerate(members):
        for count in range(min(cap, index) + 1):
            part = behind(member) if count else member
            more = Call(rule(index + 1, min(count + 1, cap)))
            options: list[Node] = [] if count == most else [sequence(part, more)]
            if not required:
                options.append(Call(rule(index + 1, count)))
            rules[rule(index, count)] = Choice(tuple(options))
    for count in range(cap + 1):
        rules[rule(len(members), count)] = end(count)
    return rules
