"""Slots and automata: states move with what is given, and nothing outlives its owner."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from helpers.choices import of_choices

from vllm_diffusion.constrain.automaton.slots import AutomatonSlots, DeviceAutomaton
from vllm_diffusion.constrain.automaton.walk import DEAD, Walk
from vllm_diffusion.records import CanvasBatch, Emission, StopReason

VOCAB, END, LENGTH = 8, 7, 4
CPU = torch.device("cpu")
FIRST = of_choices([[1, 2, 3, 4, 5], [6]], [END], VOCAB)
SECOND = of_choices([[2, 2]], [END], VOCAB)


def batch_of(slots: list[int], starts: list[int], widths: list[int]) -> CanvasBatch:
    width = torch.tensor(widths)
    offset = torch.arange(LENGTH)
    return CanvasBatch(
        slots=torch.tensor(slots),
        width=width,
        position=torch.tensor(starts)[:, None] + offset,
        valid=offset < width[:, None],
    )


def emission_of(tokens: list[list[int]], counts: list[int]) -> Emission:
    rows = [[*row, *[0] * (LENGTH - len(row))] for row in tokens]
    zeros = torch.zeros(len(rows), dtype=torch.int64)
    return Emission(
        tokens=torch.tensor(rows),
        count=torch.tensor(counts),
        steps=zeros,
        reason=zeros + StopReason.SETTLED,
        entropy=zeros.float(),
    )


@pytest.fixture
def slots() -> AutomatonSlots:
    table = AutomatonSlots(num_slots=4, device=CPU)
    table.admit(0, FIRST, name="first", output=[], behind=13)
    table.admit(2, SECOND, name="second", output=[], behind=100)
    table.admit(3, FIRST, name="first", output=[1, 2], behind=30)
    return table


def test_a_batch_in_which_nobody_is_constrained(slots: AutomatonSlots) -> None:
    assert slots.canvases([1], batch_of([1], [5], [4])) == ()


def test_canvases_of_one_automaton_share_a_record_and_its_tensors(slots: AutomatonSlots) -> None:
    order = [3, 1, 0, 2]
    found = slots.canvases(order, batch_of(order, [22, 5, 10, 96], [4, 4, 2, 4]))
    first, second = found
    assert first.canvas.tolist() == [0, 2]
    assert second.canvas.tolist() == [3]
    walk = Walk(FIRST)
    assert first.start.tolist() == [walk.through(FIRST.start, [1, 2]), FIRST.start]
    # 8 may be written from 22 on, 3 from 10 on, 4 from 96 on.
    assert first.rows.tolist() == [4, 2]
    assert first.left.tolist() == [4, 1]
    assert (second.rows.tolist(), second.left.tolist()) == ([4], [0])


def test_rows_behind_the_last_token_are_free(slots: AutomatonSlots) -> None:
    (first,) = slots.canvases([0], batch_of([0], [11], [4]))
    assert (first.rows.tolist(), first.left.tolist()) == ([2], [0])
    (first,) = slots.canvases([0], batch_of([0], [13], [4]))
    assert (first.rows.tolist(), first.left.tolist()) == ([0], [0])


def test_states_move_with_what_is_given_however_much(slots: AutomatonSlots) -> None:
    order = [0, 2, 3]
    batch = batch_of(order, [0, 0, 0], [4, 4, 4])
    before = slots.state.clone()
    slots.advance(order, batch, emission_of([[1] * 4] * 3, [0, 0, 0]))
    assert torch.equal(slots.state, before)
    slots.advance(order, batch, emission_of([[1, 2, 1], [2, 2, END, 5], [3, 4]], [2, 4, 1]))
    first, second = Walk(FIRST), Walk(SECOND)
    assert slots.state[0] == first.through(FIRST.start, [1, 2])
    assert slots.state[2] == SECOND.end == second.through(SECOND.start, [2, 2, END, 5])
    assert slots.state[3] == first.through(FIRST.start, [1, 2, 3])


def test_a_slot_of_nobody_is_not_touched(slots: AutomatonSlots) -> None:
    slots.state[1] = 77
    slots.advance([1, 0], batch_of([1, 0], [0, 0], [4, 4]), emission_of([[1], [6, END]], [1, 2]))
    assert slots.state[1] == 77
    assert slots.state[0] == FIRST.end


def test_the_device_walks_as_the_host_does() -> None:
    choice = random.Random(5)
    tensors, walk = DeviceAutomaton.of(FIRST, CPU), Walk(FIRST)
    for _ in range(200):
        text = choice.choice([[1, 2, 3, 4, 5, END], [6, END]])
        tokens = [token if choice.random() < 0.9 else choice.randrange(8) for token in text][:4]
        count = choice.randrange(len(tokens) + 1)
        padded = torch.tensor([[*tokens, *[0] * (LENGTH - len(tokens))]])
        state = tensors.behind(torch.tensor([FIRST.start]), padded, torch.tensor([count]))
        expected = walk.through(FIRST.start, tokens[:count])
        assert state.tolist() == [FIRST.end if expected == DEAD else expected]


def test_a_release_frees_the_tensors_with_their_last_owner(slots: AutomatonSlots) -> None:
    assert len(slots) == 3
    slots.canvases([0, 3], batch_of([0, 3], [0, 0], [4, 4]))
    slots.release(0)
    gc.collect()
    assert set(slots._shared) == {"first", "second"}
    slots.release(3)
    slots.release(1)  # was never constrained
    gc.collect()
    assert set(slots._shared) == {"second"}
    assert len(slots) == 1


def test_a_new_owner_replaces_the_last(slots: AutomatonSlots) -> None:
    slots.admit(0, SECOND, name="second", output=[2], behind=9)
    (found,) = slots.canvases([0], batch_of([0], [5], [4]))
    assert found.automaton.edges.end == SECOND.end
    assert found.start.tolist() == [Walk(SECOND).through(SECOND.start, [2])]
