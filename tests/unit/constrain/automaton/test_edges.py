"""The device form of an automaton, and where committed tokens lead."""

from __future__ import annotations

import numpy as np
import torch
from helpers.cases import for_each
from helpers.chains import from_table, random_automaton, read

from vllm_diffusion.constrain.automaton.edges import Edges, next_state
from vllm_diffusion.constrain.automaton.native import MergedEdges

LENGTH = 7


@for_each(seed=range(5))
def test_tokens_lead_where_the_edges_do(seed: int) -> None:
    automaton = random_automaton(seed, states=6, classes=5, vocab=9, density=0.8)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 9, (60, LENGTH))
    start = rng.integers(0, automaton.num_states, 60)
    count = rng.integers(0, LENGTH + 1, 60)
    classes = torch.from_numpy(automaton.class_of[tokens]).long()
    found = next_state(
        Edges.of(automaton), torch.from_numpy(start), classes, torch.from_numpy(count)
    )
    wanted = [
        read(automaton, int(first), said[:many])[-1]
        for first, said, many in zip(start, tokens.tolist(), count, strict=True)
    ]
    assert found.tolist() == wanted
    assert -1 in wanted
    assert automaton.end in wanted


def test_what_is_lost_stays_lost() -> None:
    edges = Edges.of(random_automaton(1))
    lost = next_state(edges, torch.tensor([-1]), torch.tensor([[1, 2, 3]]), torch.tensor([3]))
    assert lost.tolist() == [-1]


@for_each(seed=range(5))
def test_merged_edges_are_the_edges(seed: int) -> None:
    automaton = random_automaton(seed, states=9, classes=12, vocab=30, density=0.7)
    merged = MergedEdges.of(automaton)
    edges = {
        (state, int(symbol), int(merged.pair_target[pair]))
        for state in range(automaton.num_states)
        for pair in range(merged.pair_first[state], merged.pair_first[state + 1])
        for symbol in merged.set_class[
            merged.set_first[merged.pair_set[pair]] : merged.set_first[merged.pair_set[pair] + 1]
        ]
    }
    listed = zip(
        automaton.source.tolist(),
        automaton.symbol.tolist(),
        automaton.target.tolist(),
        strict=True,
    )
    assert edges == set(listed)
    assert len(merged.pair_set) < len(automaton.source)


def test_parallel_edges_are_one_pair_and_equal_sets_one_set() -> None:
    # Both states stay by classes 1 and 2; the first leads on by 3.
    goes = np.array([[-1, 0, 0, 1, -1], [-1, 1, 1, -1, 2]])
    automaton = from_table(goes, np.array([False, True]), np.arange(5, dtype=np.int32))
    merged = MergedEdges.of(automaton)
    assert merged.pair_target.tolist() == [0, 1, 1, 2]
    assert merged.pair_set.tolist() == [0, 1, 0, 2]
    assert merged.set_class.tolist() == [1, 2, 3, 4]


def test_a_constraint_that_says_nothing_has_no_edges() -> None:
    automaton = from_table(np.full((1, 2), -1), np.array([True]), np.array([0, 1], dtype=np.int32))
    edges = Edges.of(automaton)
    assert edges.degree == 0
    said = torch.tensor([[1]])
    assert next_state(edges, torch.tensor([0]), said, torch.tensor([1])).tolist() == [-1]
    assert MergedEdges.of(automaton).set_first.tolist() == [0]
