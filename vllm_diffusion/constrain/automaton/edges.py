"""A token automaton on the device, its edges in the three orders that sums over them need.

In: a ``TokenAutomaton``. Out: ``Edges``, which ``posterior.condition`` reads, and ``next_state``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.automaton import native

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Edges that have something in common, side by side."""

    order: Tensor  # [E] int64, edges by group
    first: Tensor  # [G + 1] int64, where each group begins in the order

    def total(self, values: Tensor) -> Tensor:
        """[G, B], the sums of the groups of ``values`` [E, B], 0 where a group is empty."""
        ordered = values.index_select(0, self.order)
        return torch.segment_reduce(ordered, "sum", offsets=self.first, unsafe=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edges:
    """``TokenAutomaton`` on the device: N states, the last one the end, C classes, E edges."""

    source: Tensor  # [E] int64, ascending
    symbol: Tensor  # [E] int64, ascending inside a source
    target: Tensor  # [E] int64
    first: Tensor  # [N + 1] int64, the first edge of every source
    into: Groups  # by target, N
    reading: Groups  # by symbol, C
    distance: Tensor  # [N] int64, fewest tokens to an accepting state
    degree: int  # most edges that leave a state
    merged: native.MergedEdges | None  # the same on the host, for the C++ form, where that is built

    @staticmethod
    def of(automaton: TokenAutomaton, device: torch.device | str = "cpu") -> Edges:
        """The device form of ``automaton``."""
        source, symbol, target, distance = (
            torch.from_numpy(ids).to(device, torch.int64)
            for ids in (automaton.source, automaton.symbol, automaton.target, automaton.distance)
        )
        first = _first(source, automaton.num_states)
        return Edges(
            source=source,
            symbol=symbol,
            target=target,
            first=first,
            into=_grouped(target, automaton.num_states),
            reading=_grouped(symbol, automaton.num_classes),
            distance=distance,
            degree=int(first.diff().amax()),
            merged=native.MergedEdges.of(automaton) if native.library() is not None else None,
        )

    @property
    def end(self) -> int:
        """The state behind the end token."""
        return len(self.distance) - 1

    def total(self, values: Tensor) -> Tensor:
        """[N, B], the log of the summed exponentials of ``values`` [E, B] that leave a state."""
        top = self.best(values)
        # Where all is -inf so is the result: nothing may be subtracted there.
        shifted = values - top.masked_fill(top == -torch.inf, 0.0).index_select(0, self.source)
        return top + self._leaving("sum", shifted.exp()).log().masked_fill(top == -torch.inf, 0.0)

    def best(self, values: Tensor) -> Tensor:
        """[N, B], the largest of ``values`` [E, B] that leave a state, -inf where none does."""
        return self._leaving("max", values)

    def _leaving(self, reduce: str, values: Tensor) -> Tensor:
        return torch.segment_reduce(values, reduce, offsets=self.first, unsafe=True)


def next_state(edges: Edges, start: Tensor, classes: Tensor, count: Tensor) -> Tensor:
    """[B] int64, the states behind committed tokens; -1 where no edge reads one of them.

    Args:
        edges: of the automaton that all canvases share.
        start: [B] int64, the states before the first token; -1 stays.
        classes: [B, L] int64, token classes, ``class_of[tokens]``.
        count: [B] int64, how many of the tokens count.
    """
    num_classes = len(edges.reading.first) - 1
    beyond = edges.source.new_full((1,), -1)  # a last place, where no key is found
    keys = edges.source * num_classes + edges.symbol
    listed, target = torch.cat([keys, beyond]), torch.cat([edges.target, beyond])
    state = start
    for row in range(classes.shape[1]):
        key = state * num_classes + classes[:, row]
        place = torch.searchsorted(keys, key)
        read = torch.where((state >= 0) & (listed[place] == key), target[place], -1)
        state = torch.where((row < count) & (state != edges.end), read, state)
    return state


def _grouped(group: Tensor, groups: int) -> Groups:
    ordered, order = group.sort(stable=True)
    return Groups(order=order, first=_first(ordered, groups))


def _first(ordered: Tensor, groups: int) -> Tensor:
    """[groups + 1], where each group begins in ``ordered`` ascending, and where the last ends."""
    return torch.searchsorted(ordered, torch.arange(groups + 1, device=ordered.device))
