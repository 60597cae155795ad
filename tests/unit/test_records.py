"""The records that cross a stage border: frozen, complete, and reshaped without mixing rows."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion import records
from vllm_diffusion.constrain import constraints, rewrite
from vllm_diffusion.constrain.automaton import class_stats
from vllm_diffusion.constrain.automaton.class_stats import ClassStats
from vllm_diffusion.denoise import constants
from vllm_diffusion.records import CanvasStats, Noise

HOMES = records, rewrite, constraints, class_stats, constants
RECORDS = [
    thing
    for home in HOMES
    for thing in vars(home).values()
    if is_dataclass(thing) and thing.__module__ == home.__name__ and fields(thing)
]


def numbered_stats(rows: int, first: int = 0) -> CanvasStats:
    """Every field of every row holds another number, so a mix-up cannot go unseen."""
    line = torch.arange(first, first + rows)
    return CanvasStats(
        argmax=line,
        sample=line + 1000,
        entropy=line + 0.25,
        top_prob=line + 0.5,
        margin=line + 0.75,
        soft_embedding=line[:, None] * 10.0 + torch.arange(3),
        sample_prob=line + 0.125,
        own_prob=line + 0.375,
    )


@for_each(record=RECORDS)
def test_records_are_frozen_slotted_and_keyword_only(record: type) -> None:
    names = [field.name for field in fields(record)]
    instance = record(**dict.fromkeys(names))
    with pytest.raises(FrozenInstanceError):
        setattr(instance, names[0], 1)
    assert not hasattr(instance, "__dict__")
    with pytest.raises(TypeError):
        record(*names)


def test_the_records_above_are_found() -> None:
    names = {record.__name__ for record in RECORDS}
    assert names >= {
        "CanvasStats",
        "Decision",
        "Rewrite",
        "Constraints",
        "ClassStats",
        "ServedRules",
    }


def test_none_stays_none() -> None:
    row = torch.zeros(1, dtype=torch.int64)
    stats = replace(numbered_stats(3), margin=None)
    made = [
        stats.reshape(3, 1),
        stats.take(row),
        stats.replaced(row, stats.take(row)),
        stats.spread(torch.tensor([0, 2, 1]), 4),
        CanvasStats.concatenate([stats, stats]),
    ]
    for each in made:
        assert each.margin is None
        assert each.entropy is not None


def test_zeros_have_the_statistics_that_are_asked_for() -> None:
    hidden = torch.ones(3, 2)
    plain = CanvasStats.zeros(hidden)
    assert plain.sample_prob is plain.own_prob is None
    asked = CanvasStats.zeros(hidden, sample_prob=True, own_prob=True)
    assert asked.sample_prob.tolist() == asked.own_prob.tolist() == [0.0] * 3
    asked.where(torch.ones(3, dtype=torch.bool), asked).replaced(
        torch.tensor([1]), asked.take(torch.tensor([2]))
    )


def test_reshape_keeps_rows_together() -> None:
    flat = numbered_stats(6)
    canvases = flat.reshape(2, 3)
    assert canvases.soft_embedding.shape == (2, 3, 3)
    for row in range(6):
        at = divmod(row, 3)
        for field in fields(CanvasStats):
            assert torch.equal(getattr(canvases, field.name)[at], getattr(flat, field.name)[row])
    back = canvases.reshape(6)
    assert all(
        torch.equal(getattr(back, field.name), getattr(flat, field.name))
        for field in fields(CanvasStats)
    )


def test_concatenate_joins_every_field_in_order() -> None:
    joined = CanvasStats.concatenate(
        [numbered_stats(2), numbered_stats(1, 2), numbered_stats(3, 3)]
    )
    whole = numbered_stats(6)
    for field in fields(CanvasStats):
        assert torch.equal(getattr(joined, field.name), getattr(whole, field.name))


def test_take_cuts_every_part_of_the_key() -> None:
    noise = Noise(
        seed=torch.arange(10).view(5, 2), position=torch.arange(5) * 7, step=torch.arange(5)
    )
    part = noise.take(slice(1, 3))
    assert part.seed.tolist() == [[2, 3], [4, 5]]
    assert part.position.tolist() == [7, 14]
    assert part.step.tolist() == [1, 2]


def test_statistics_by_class_are_joined_and_put_in_their_places() -> None:
    def numbered(rows: int, first: int) -> ClassStats:
        line = torch.arange(first, first + rows)[:, None] * 10 + torch.arange(2)
        names = [field.name for field in fields(ClassStats)]
        return ClassStats(**{name: line + 1000 * at for at, name in enumerate(names)})

    joined = ClassStats.concatenate([numbered(2, 0), numbered(1, 2)])
    placed = joined.permuted(torch.tensor([2, 0, 1]))
    for field in fields(ClassStats):
        whole = getattr(numbered(3, 0), field.name)
        assert torch.equal(getattr(joined, field.name), whole)
        assert torch.equal(getattr(placed, field.name), whole[[1, 2, 0]])
