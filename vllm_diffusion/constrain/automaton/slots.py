"""Which slots obey which automaton, and where in it each of them stands.

    admit -> (canvases, advance)* -> release

Takes automata and the tokens that canvases emit. Gives the constrained canvases of a batch, with
their automata and the states at their borders. The state before a slot's canvas moves when tokens
are emitted; it lives on the device, so nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias
from weakref import WeakValueDictionary

import torch

from vllm_diffusion.constrain.automaton.edges import Edges, next_state
from vllm_diffusion.constrain.automaton.walk import DEAD, Walk
from vllm_diffusion.constrain.transfer import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.records import CanvasBatch, Emission


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class DeviceAutomaton:
    """What a step needs of a ``TokenAutomaton``, on the device."""

    class_of: Tensor  # [V] int32, class of every token id
    num_classes: int  # C, class 0 counted
    edges: Edges

    @staticmethod
    def of(automaton: TokenAutomaton, device: torch.device) -> DeviceAutomaton:
        """Copy an automaton to a device."""
        return DeviceAutomaton(
            class_of=torch.from_numpy(automaton.class_of).to(device, torch.int32),
            num_classes=automaton.num_classes,
            edges=Edges.of(automaton, device),
        )

    def behind(self, state: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
        """The state behind the first ``count`` of some tokens.

        If no text of the constraint continues that way, it is the end: everything is free.

        Args:
            state: [K] int64.
            tokens: [K, L] int64.
            count: [K] int64, at most L.
        """
        # On the host, looking at the counts costs nothing.
        places = tokens.shape[1] if count.device.type != "cpu" else int(count.max())
        onward = next_state(self.edges, state, self.class_of[tokens[:, :places]].long(), count)
        return torch.where(onward < 0, self.edges.end, onward)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstrainedCanvases:
    """The K canvases of a batch that obey one automaton, in the batch's order."""

    automaton: DeviceAutomaton
    places: tuple[int, ...]  # which canvases of the batch, on the host
    canvas: Tensor  # [K] int64, the same on the device
    start: Tensor  # [K] int64, state before its first row
    rows: Tensor  # [K] int64, rows that obey, 0..width: those behind are past the request's end
    left: Tensor  # [K] int64, tokens the request may write behind this canvas

    def take(self, index: slice) -> ConstrainedCanvases:
        """Some of the canvases."""
        return ConstrainedCanvases(
            automaton=self.automaton,
            places=self.places[index],
            canvas=self.canvas[index],
            start=self.start[index],
            rows=self.rows[index],
            left=self.left[index],
        )


@dataclass(frozen=True, slots=True)
class _Owner:
    automaton: DeviceAutomaton
    behind: int  # absolute position behind the last token that may be written


_Group: TypeAlias = tuple[DeviceAutomaton, tuple[int, ...], "Tensor", "Tensor"]
"""An automaton, its K canvases on host and device, and the end of each one's budget, [K] int64."""


class AutomatonSlots:
    """Automata and boundary states by slot; ``admit`` overwrites the slot's last owner."""

    def __init__(self, *, num_slots: int, device: torch.device) -> None:
        self.device = device
        self.state = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[S], the state before the slot's canvas; anything where no automaton is."""
        self._owners: dict[int, _Owner] = {}
        # Requests of one constraint share its tensors, which go with the last of them.
        self._shared: WeakValueDictionary[str, DeviceAutomaton] = WeakValueDictionary()
        self._seen: tuple[tuple[int, ...], list[_Group]] | None = None

    def admit(
        self,
        slot: int,
        automaton: TokenAutomaton,
        *,
        name: str,
        output: Sequence[int],
        behind: int,
    ) -> None:
        """Constrain the canvases of a slot.

        Args:
            slot: which.
            automaton: of the request.
            name: equal for equal automata.
            output: tokens that the request has already emitted, if it was preempted.
            behind: absolute position behind the last token that it may write.
        """
        self._seen = None
        shared = self._shared.get(name)
        if shared is None:
            self._shared[name] = shared = DeviceAutomaton.of(automaton, self.device)
        self._owners[slot] = _Owner(shared, behind)
        state = Walk(automaton).through(automaton.start, output)
        self.state[slot].fill_(automaton.end if state == DEAD else state)

    def release(self, slot: int) -> None:
        """Forget the slot's automaton, if it has one."""
        self._seen = None
        self._owners.pop(slot, None)

    def __len__(self) -> int:
        """Slots that have an automaton."""
        return len(self._owners)

    def canvases(self, slots: Sequence[int], batch: CanvasBatch) -> tuple[ConstrainedCanvases, ...]:
        """The constrained canvases of a batch, one record for each automaton; mostly none.

        Args:
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
        """
        if self._owners.keys().isdisjoint(slots):
            return ()
        return tuple(
            ConstrainedCanvases(
                automaton=automaton,
                places=places,
                canvas=canvas,
                start=self.state[batch.slots[canvas]],
                rows=rows,
                left=remaining - rows,
            )
            for automaton, places, canvas, behind in self._groups(tuple(slots))
            for remaining in ((behind - batch.position[canvas, 0]).clamp(min=0),)
            for rows in (torch.minimum(batch.width[canvas], remaining),)
        )

    def advance(self, slots: Sequence[int], batch: CanvasBatch, emission: Emission) -> None:
        """Move the states behind the tokens that a step's canvases emitted.

        Args:
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
            emission: of this batch.
        """
        if self._owners.keys().isdisjoint(slots):
            return
        # Most steps emit nothing, and on the host it is free to look.
        if emission.count.device.type == "cpu" and not emission.count.any():
            return
        for automaton, _, canvas, _ in self._groups(tuple(slots)):
            at = batch.slots[canvas]
            tokens, count = emission.tokens[canvas].long(), emission.count[canvas]
            self.state[at] = automaton.behind(self.state[at], tokens, count)

    def _groups(self, slots: tuple[int, ...]) -> list[_Group]:
        if self._seen is None or self._seen[0] != slots:
            members: dict[DeviceAutomaton, list[tuple[int, int]]] = {}
            for canvas, slot in enumerate(slots):
                if (owner := self._owners.get(slot)) is not None:
                    members.setdefault(owner.automaton, []).append((canvas, owner.behind))
            groups = []
            for automaton, each in members.items():
                places, behind = zip(*each, strict=True)
                groups.append((automaton, places, self._tensor(places), self._tensor(behind)))
            self._seen = slots, groups
        return self._seen[1]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return on_device(values, self.device)
