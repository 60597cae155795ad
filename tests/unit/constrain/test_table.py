"""The wishes of slots as a batch's rewrite: what each becomes, and that no slot inherits any."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from vllm_diffusion.constrain.constraints import Constraints, Holes
from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.constrain.table import ConstraintTable
from vllm_diffusion.records import CanvasBatch

SLOTS, LENGTH, VOCAB = 4, 5, 50
TEXT = torch.arange(SLOTS)[:, None] * 10 + torch.arange(30) % 4  # slot 2 holds 20 21 22 23 20 ...
PROMPT = 6


def make_table() -> ConstraintTable:
    return ConstraintTable(canvas_length=LENGTH, vocab_size=VOCAB, device=torch.device("cpu"))


def make_batch(*slots: int, start: int = PROMPT) -> CanvasBatch:
    position = (start + torch.arange(LENGTH)).expand(len(slots), LENGTH)
    return CanvasBatch(
        slots=torch.tensor(slots),
        width=torch.full((len(slots),), LENGTH),
        position=position,
        valid=torch.ones(len(slots), LENGTH, dtype=torch.bool),
    )


def rewrite_of(
    table: ConstraintTable,
    *slots: int,
    start: int = PROMPT,
    argmax: torch.Tensor | None = None,
    step: int = 0,
) -> Rewrite | None:
    return table.rewrite(
        slots,
        make_batch(*slots, start=start),
        text=TEXT.int(),
        argmax=torch.zeros(SLOTS, LENGTH, dtype=torch.int64) if argmax is None else argmax,
        step=torch.full((SLOTS,), step),
    )


def asked(**wishes: Any) -> Rewrite:
    """The rewrite of slots 1 and 2, of which 2 has the wishes."""
    table = make_table()
    table.admit(1, Constraints(), prompt_length=3)
    table.admit(2, Constraints(**wishes), prompt_length=PROMPT)
    rewrite = rewrite_of(table, 1, 2)
    assert rewrite is not None
    return rewrite


def parts(rewrite: Rewrite) -> set[str]:
    return {f.name for f in fields(Rewrite) if getattr(rewrite, f.name) is not None} - {"canvas"}


def test_nobody_asks_for_anything() -> None:
    table = make_table()
    table.admit(0, Constraints(), prompt_length=1)
    table.admit(3, Constraints(top_k=2), prompt_length=1)
    assert rewrite_of(table, 0, 1) is None


@pytest.mark.parametrize(
    ("wish", "part"),
    [
        ({"temperature": 0.5}, {"temperature"}),
        ({"temperature": 0.0}, {"temperature", "greedy"}),
        ({"min_p": 0.1}, {"truncation"}),
        ({"top_k": 5}, {"truncation"}),
        ({"top_p": 0.9}, {"truncation"}),
        ({"allowed": (3, 4)}, {"allowed"}),
        ({"bias": ((3, 1.0),)}, {"bias"}),
        ({"repetition": 1.2}, {"penalties"}),
        ({"frequency": 0.2}, {"penalties"}),
        ({"presence": 0.2}, {"penalties"}),
        ({"early": ((3, 2),)}, {"forbidden"}),
        ({"bad_words": ((3,),)}, {"forbidden", "words"}),
        ({"seed_canvas": (1,) * LENGTH, "pinned": (0,)}, {"pinned"}),
        ({"seed_canvas": (1,) * LENGTH}, set()),
        ({"seed_canvas": (1,) * LENGTH, "first_step": 3}, set()),
        (
            {"seed_canvas": (1,), "pinned": (0,), "holes": Holes(shown=1, pad=0, end=1)},
            {"pinned", "slack"},
        ),
    ],
)
def test_a_wish_becomes_its_part_and_nothing_else(wish: dict[str, Any], part: set[str]) -> None:
    assert parts(asked(**wish)) == part


def test_every_wish_is_tried_above() -> None:
    tried = set()
    for mark in test_a_wish_becomes_its_part_and_nothing_else.pytestmark:
        for wish, _ in mark.args[1]:
            tried |= wish.keys()
    assert tried == {field.name for field in fields(Constraints)}


def test_values_stand_at_the_canvas_that_asked() -> None:
    rewrite = asked(
        temperature=0.5,
        min_p=0.1,
        top_k=7,
        top_p=0.9,
        allowed=(3, 4),
        bias=((8, 1.5), (9, -2.0)),
    )
    assert rewrite.canvas.tolist() == [0] * LENGTH + [1] * LENGTH
    assert rewrite.temperature.tolist() == [1.0, 0.5]
    assert rewrite.allowed.tolist() == [[-1, -1], [3, 4]]
    ids, bias = rewrite.bias
    assert ids[1].tolist() == [8, 9]
    assert bias.tolist() == [[0.0, 0.0], [1.5, -2.0]]
    assert rewrite.truncation.min_p.tolist() == pytest.approx([0.0, 0.1])
    assert rewrite.truncation.top_k.tolist() == [VOCAB, 7]
    assert rewrite.truncation.top_p.tolist() == pytest.approx([1.0, 0.9])
    assert rewrite.truncation.sorts


def test_greedy_keeps_the_schedules_temperature() -> None:
    rewrite = asked(temperature=0.0)
    assert rewrite.temperature.tolist() == [1.0, 1.0]
    assert rewrite.greedy.tolist() == [False, True]


def test_min_p_alone_sorts_nothing() -> None:
    assert not asked(min_p=0.1).truncation.sorts


def test_early_ids_are_forbidden_up_to_their_position() -> None:
    rewrite = asked(early=((30, 2), (31, 4)))
    assert rewrite.forbidden[:LENGTH].tolist() == [[-1, -1]] * LENGTH
    assert rewrite.forbidden[LENGTH:].tolist() == [
        [30, 31], [30, 31], [-1, 31], [-1, 31], [-1, -1],
    ]  # fmt: skip


def test_positions_count_from_the_end_of_the_prompt_also_in_a_later_canvas() -> None:
    table = make_table()
    table.admit(2, Constraints(early=((30, 7),)), prompt_length=PROMPT)
    later = rewrite_of(table, 2, start=PROMPT + LENGTH)
    assert later.forbidden.flatten().tolist() == [30, 30, -1, -1, -1]


def test_pins_stand_at_their_positions_of_the_first_canvas_alone() -> None:
    table = make_table()
    seed = (11, 12, 13, 14, 15)
    table.admit(2, Constraints(seed_canvas=seed, pinned=(1, 4)), prompt_length=PROMPT)
    assert rewrite_of(table, 2).pinned.tolist() == [-1, 12, -1, -1, 15]
    later = rewrite_of(table, 2, start=PROMPT + LENGTH)
    assert later.pinned.tolist() == [-1] * LENGTH


def test_the_seed_canvas_is_the_first_input_of_the_first_canvas_alone() -> None:
    table = make_table()
    table.admit(2, Constraints(seed_canvas=(11, 12, 13)), prompt_length=PROMPT)
    first = make_batch(0, 2).position
    assert first_input(table, [0, 2], first) == ([[-1] * 5, [11, 12, 13, -1, -1]], [0, 0])
    assert first_input(table, [0, 2], first + LENGTH) == ([[-1] * 5] * 2, [0, 0])
    assert table.first_input([0, 1], first) is None
    assert not table.has_draft([0, 1, 2])


def test_a_draft_reaches_every_canvas_it_is_long_enough_for() -> None:
    table = make_table()
    draft = tuple(range(10, 10 + 2 * LENGTH))
    table.admit(2, Constraints(seed_canvas=draft, first_step=7), prompt_length=PROMPT)
    table.admit(3, Constraints(seed_canvas=draft, first_step=0), prompt_length=PROMPT)
    assert table.has_draft([0, 2])
    assert table.has_draft([3])
    assert not table.has_draft([0, 1])
    position = make_batch(2).position
    for canvas in range(2):
        part = list(draft[canvas * LENGTH : (canvas + 1) * LENGTH])
        assert first_input(table, [2], position + canvas * LENGTH) == ([part], [7])
    assert first_input(table, [2], position + 2 * LENGTH) == ([[-1] * LENGTH], [0])


def first_input(
    table: ConstraintTable, slots: list[int], position: torch.Tensor
) -> tuple[list[list[int]], list[int]]:
    given = table.first_input(slots, position)
    assert given is not None
    tokens, step = given
    return tokens.tolist(), step.tolist()


def test_holes_are_the_free_rows_that_are_shown() -> None:
    table = make_table()
    holes = Holes(shown=4, pad=0, end=9)
    wishes = Constraints(seed_canvas=(11, -1, 13, -1, 15), pinned=(0, 2, 4), holes=holes)
    table.admit(2, wishes, prompt_length=PROMPT)
    slack = rewrite_of(table, 1, 2).slack
    assert slack.shown.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert slack.hole[1].tolist() == [False, True, False, True, False]
    assert slack.pad.tolist() == [-1, 0]
    assert slack.end.tolist() == [-1, 9]
    assert not rewrite_of(table, 2, start=PROMPT + LENGTH).slack.hole.any()
    table.admit(2, Constraints(top_k=3), prompt_length=PROMPT)
    assert rewrite_of(table, 1, 2).slack is None


def test_penalties_are_of_the_slots_own_text_before_the_canvas() -> None:
    table = make_table()
    table.admit(2, Constraints(frequency=0.5), prompt_length=4)
    cost = rewrite_of(table, 2, start=10).penalties
    held = dict(zip(cost.ids[0].tolist(), cost.offset[0].tolist(), strict=True))
    # Output is positions 4..9 of 20 21 22 23 20 21 22 23 20 21.
    assert held == {20: 1.0, 21: 1.0, 22: 0.5, 23: 0.5}


def test_bad_words_see_the_output_and_the_last_steps_argmax() -> None:
    table = make_table()
    words = ((20, 21, 5), (7, 8))
    table.admit(2, Constraints(bad_words=words), prompt_length=4)
    argmax = torch.full((SLOTS, LENGTH), 7)
    for step, second in ((0, -1), (1, 8)):
        forbidden = rewrite_of(table, 2, start=10, argmax=argmax, step=step).forbidden
        assert forbidden.tolist() == [[5, -1], *[[-1, second]] * 4]


@pytest.mark.parametrize("heir", [Constraints(), Constraints(temperature=0.5)])
def test_a_slot_inherits_nothing(heir: Constraints) -> None:
    table, fresh = make_table(), make_table()
    everything = Constraints(
        temperature=0.0,
        min_p=0.5,
        top_k=1,
        top_p=0.1,
        allowed=(1,),
        bias=((1, 1.0),),
        repetition=2.0,
        frequency=1.0,
        presence=1.0,
        early=((1, 9),),
        bad_words=((1, 2),),
        seed_canvas=(1,) * LENGTH,
        pinned=(0,),
        holes=Holes(shown=2, pad=0, end=1),
        first_step=3,
    )
    table.admit(2, everything, prompt_length=PROMPT)
    assert rewrite_of(table, 2) is not None  # the batch has been seen
    for each in (table, fresh):
        each.admit(2, heir, prompt_length=PROMPT)
    ours, expected = rewrite_of(table, 2), rewrite_of(fresh, 2)
    if expected is None:
        assert ours is None
    else:
        assert parts(ours) == parts(expected) == {"temperature"}
    assert table.first_input([2], make_batch(2).position) is None
    assert not table.has_draft([2])
