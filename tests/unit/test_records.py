"""The records that cross a stage border: frozen, complete, and reshaped without mixing rows."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from vllm_diffusion import records
from vllm_diffusion.denoise.constants import EntropyBoundConstants, ServedRules
from vllm_diffusion.records import CanvasStats, ClassStats, Noise

RECORDS = [
    records.CanvasBatch,
    records.Noise,
    records.CanvasStats,
    records.ClassStats,
    records.Commit,
    records.Decision,
    records.Emission,
    records.BadWords,
    records.Constraints,
    records.Holes,
    records.Slack,
    records.Penalties,
    records.Rewrite,
    records.TokenScores,
    records.Truncation,
    records.Wish,
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
    )


@pytest.mark.parametrize(
    "record", [*RECORDS, EntropyBoundConstants, ServedRules], ids=lambda record: record.__name__
)
def test_records_are_frozen_slotted_and_keyword_only(record: type) -> None:
    names = [field.name for field in fields(record)]
    instance = record(**dict.fromkeys(names))
    with pytest.raises(FrozenInstanceError):
        setattr(instance, names[0], 1)
    assert not hasattr(instance, "__dict__")
    with pytest.raises(TypeError):
        record(*names)


def test_no_record_is_left_out_above() -> None:
    declared = {
        thing
        for thing in vars(records).values()
        if isinstance(thing, type) and thing.__module__ == records.__name__
    }
    assert declared - {records.StopReason} == set(RECORDS)


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


def test_noise_rows_cuts_every_part_of_the_key() -> None:
    noise = Noise(
        seed=torch.arange(10).view(5, 2), position=torch.arange(5) * 7, step=torch.arange(5)
    )
    part = noise.rows(slice(1, 3))
    assert part.seed.tolist() == [[2, 3], [4, 5]]
    assert part.position.tolist() == [7, 14]
    assert part.step.tolist() == [1, 2]


def test_statistics_by_class_are_joined_and_put_in_their_places() -> None:
    def numbered(rows: int, first: int) -> ClassStats:
        line = torch.arange(first, first + rows)[:, None] * 10 + torch.arange(2)
        names = [field.name for field in fields(ClassStats)]
        return ClassStats(**{name: line + 1000 * at for at, name in enumerate(names)})

    joined = ClassStats.concatenate([numbered(2, 0), numbered(1, 2)])
    placed = joined.spread(torch.tensor([2, 0, 1]))
    for field in fields(ClassStats):
        whole = getattr(numbered(3, 0), field.name)
        assert torch.equal(getattr(joined, field.name), whole)
        assert torch.equal(getattr(placed, field.name), whole[[1, 2, 0]])
