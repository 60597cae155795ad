"""Which slots obey which automaton, and where in it each of them stands.

    admit -> (canvases, advance)* -> release

Takes automata and the tokens that canvases give. Says of a batch which canvases are constrained, by
what, and between which borders. The state before a slot's canvas moves when tokens of it leave,
however many; it lives on the device, so nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch

from vllm_diffusion.constrain.automaton.walk import DEAD, Walk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.records import CanvasBatch, Emission


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class AutomatonTensors:
    """A ``TokenAutomaton`` on a device. N states, C classes, E edges, V tokens."""

    class_of: Tensor  # [V] int64
    num_classes: int
    source: Tensor  # [E] int64, ascending
    symbol: Tensor  # [E] int64, ascending inside a source
    target: Tensor  # [E] int64
    key: Tensor  # [E] int64, source * C + symbol: ascending, so that an edge can be searched for
    num_states: int
    start: int
    accepting: Tensor  # [N] bool
    distance: Tensor  # [N] int64

    @property
    def end(self) -> int:
        """The state behind the end token."""
        return self.num_states - 1

    @staticmethod
    def of(automaton: TokenAutomaton, device: torch.device) -> AutomatonTensors:
        """The same numbers on a device."""
        classes = automaton.num_classes
        integers = (automaton.class_of, automaton.source, automaton.symbol, automaton.target)
        class_of, source, symbol, target = (
            torch.from_numpy(each).to(device, torch.int64, non_blocking=True) for each in integers
        )
        return AutomatonTensors(
            class_of=class_of,
            num_classes=classes,
            source=source,
            symbol=symbol,
            target=target,
            key=source * classes + symbol,
            num_states=automaton.num_states,
            start=automaton.start,
            accepting=torch.from_numpy(automaton.accepting).to(device, non_blocking=True),
            distance=torch.from_numpy(automaton.distance).to(
                device, torch.int64, non_blocking=True
            ),
        )

    def behind(self, state: Tensor, tokens: Tensor, count: Tensor) -> Tensor:
        """The state behind the first ``count`` of some tokens.

        Where no text of the constraint goes on so, it is the end: everything is free.

        Args:
            state: [K] int64.
            tokens: [K, L] int64.
            count: [K] int64, at most L.
        """
        classes = self.class_of[tokens]
        # Looking costs nothing where state lives on the host.
        places = tokens.shape[1] if count.device.type != "cpu" else int(count.max())
        for place in range(places):
            key = state * self.num_classes + classes[:, place]
            edge = torch.searchsorted(self.key, key).clamp_(max=len(self.key) - 1)
            found = (self.key[edge] == key) & (state != self.end)
            onward = torch.where(found, self.target[edge], self.end)
            state = torch.where(place < count, onward, state)
        return state


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstrainedCanvases:
    """The K canvases of a batch that obey one automaton, in the batch's order."""

    automaton: AutomatonTensors
    canvas: Tensor  # [K] int64, which canvas of the batch
    start: Tensor  # [K] int64, state before its first row
    rows: Tensor  # [K] int64, rows that obey, 0..width: those behind are past the request's end
    left: Tensor  # [K] int64, tokens the request may write behind this canvas


@dataclass(frozen=True, slots=True)
class _Owner:
    automaton: AutomatonTensors
    behind: int  # absolute position behind the last token that may be written


class AutomatonSlots:
    """Automata and boundary states by slot; ``admit`` overwrites the slot's last owner."""

    def __init__(self, *, num_slots: int, device: torch.device) -> None:
        self.device = device
        self.state = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[S], the state before the slot's canvas; anything where no automaton is."""
        self._owners: dict[int, _Owner] = {}
        # Requests of one constraint share its tensors, which go with the last of them.
        self._shared: WeakValueDictionary[str, AutomatonTensors] = WeakValueDictionary()
        self._seen: tuple[tuple[int, ...], list[tuple[AutomatonTensors, Tensor, Tensor]]] | None
        self._seen = None

    def admit(
        self,
        slot: int,
        automaton: TokenAutomaton,
        *,
        name: str,
        output: Sequence[int],
        behind: int,
    ) -> None:
        """Let the canvases of a slot obey.

        Args:
            slot: which.
            automaton: of the request.
            name: equal for equal automata.
            output: tokens that the request has given already: it was preempted.
            behind: absolute position behind the last token that it may write.
        """
        self._seen = None
        shared = self._shared.get(name)
        if shared is None:
            self._shared[name] = shared = AutomatonTensors.of(automaton, self.device)
        self._owners[slot] = _Owner(shared, behind)
        state = Walk(automaton).through(automaton.start, output)
        self.state[slot].fill_(automaton.end if state == DEAD else state)

    def release(self, slot: int) -> None:
        """Forget the slot's automaton, if it has one."""
        self._seen = None
        self._owners.pop(slot, None)

    def __len__(self) -> int:
        """Slots that obey something."""
        return len(self._owners)

    def canvases(self, slots: Sequence[int], batch: CanvasBatch) -> tuple[ConstrainedCanvases, ...]:
        """The constrained canvases of a batch, one record an automaton; mostly none at all.

        Args:
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
        """
        if self._owners.keys().isdisjoint(slots):
            return ()
        return tuple(
            ConstrainedCanvases(
                automaton=automaton,
                canvas=canvas,
                start=self.state[batch.slots[canvas]],
                rows=rows,
                left=remaining - rows,
            )
            for automaton, canvas, behind in self._groups(tuple(slots))
            for remaining in ((behind - batch.position[canvas, 0]).clamp(min=0),)
            for rows in (torch.minimum(batch.width[canvas], remaining),)
        )

    def advance(self, slots: Sequence[int], batch: CanvasBatch, emission: Emission) -> None:
        """Move the states behind what a step's canvases have given.

        Args:
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
            emission: of this batch.
        """
        if self._owners.keys().isdisjoint(slots):
            return
        # Most steps emit nothing. Only where state lives on the host is it free to look.
        if emission.count.device.type == "cpu" and not emission.count.any():
            return
        for automaton, canvas, _ in self._groups(tuple(slots)):
            at = batch.slots[canvas]
            tokens, count = emission.tokens[canvas].long(), emission.count[canvas]
            self.state[at] = automaton.behind(self.state[at], tokens, count)

    def _groups(self, slots: tuple[int, ...]) -> list[tuple[AutomatonTensors, Tensor, Tensor]]:
        """Of every automaton its canvases and where each of them must be over, [K] int64."""
        if self._seen is None or self._seen[0] != slots:
            members: dict[int, list[tuple[int, int]]] = {}
            automata: dict[int, AutomatonTensors] = {}
            for canvas, slot in enumerate(slots):
                if (owner := self._owners.get(slot)) is not None:
                    automata[id(owner.automaton)] = owner.automaton
                    members.setdefault(id(owner.automaton), []).append((canvas, owner.behind))
            self._seen = (
                slots,
                [
                    (
                        automata[key],
                        self._tensor([c for c, _ in each]),
                        self._tensor([b for _, b in each]),
                    )
                    for key, each in members.items()
                ],
            )
        return self._seen[1]

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
