"""How much of a soft embedding a step asks its head for: what requests chose, none at the end."""

from __future__ import annotations

from dataclasses import replace

import torch
from helpers.table_model import CONSTANTS, LENGTH, VOCAB, Engine, TableModel

from vllm_diffusion.records import CanvasBatch
from vllm_diffusion.rules.entropy_bound import EntropyBound
from vllm_diffusion.rules.rule import Rule
from vllm_diffusion.step import advance


def watched(engine: Engine) -> list[list[int] | None]:
    """What the head is asked for from now on, one number a canvas."""
    seen: list[list[int] | None] = []
    inner = engine.head

    def head(rows):
        asked = rows.soft_top_k
        seen.append(None if asked is None else asked.view(-1, LENGTH)[:, 0].tolist())
        return inner(rows)

    engine.head = head
    return seen


def test_the_last_step_that_a_canvas_may_take_needs_none() -> None:
    engine = Engine(TableModel(sharpness=0.0), replace(CONSTANTS, max_steps=3))
    seen = watched(engine)
    engine.admit(0, seed=1, start=0)
    engine.step(0)
    engine.admit(1, seed=2, start=0)
    for _ in range(3):
        engine.step(0, 1)
    # Slot 0 is out of steps first; what runs beside slot 1 after that is its commit.
    assert seen == [None, None, [-1, 0], [-1]]


def test_a_rule_of_another_kind_may_go_on_and_keeps_its_soft_embedding() -> None:
    engine = Engine(TableModel(sharpness=0.0), replace(CONSTANTS, max_steps=1))
    seen = watched(engine)
    engine.admit(0, seed=1, start=0)
    batch = CanvasBatch(
        slots=torch.tensor([0]),
        width=torch.tensor([LENGTH]),
        position=torch.arange(LENGTH)[None],
        valid=torch.ones(1, LENGTH, dtype=torch.bool),
    )
    hidden = torch.zeros(1, LENGTH, VOCAB)

    class Unending(EntropyBound):
        soft_embeddings = Rule.soft_embeddings

        def decide(self, *args):
            return replace(super().decide(*args), finished=torch.tensor([False]))

    advance(engine.pool, batch, hidden, engine.head, Unending(engine.pool.noise))
    assert seen == [None]
    assert bool((engine.pool.soft_embedding[0] > 0).all())


def test_every_canvas_gets_what_its_request_asked_for() -> None:
    engine = Engine(TableModel(sharpness=0.0))
    seen = watched(engine)
    engine.admit(0, seed=1, start=0)
    engine.admit(1, seed=2, start=0)
    engine.pool.admit(1, seed=2, constants=replace(CONSTANTS, soft_embedding_top_k=8))
    engine.pool.begin(torch.tensor([1]), torch.arange(LENGTH)[None])
    engine.step(0, 1)
    kept = (engine.pool.soft_embedding > 0).sum(dim=2)
    assert kept[0].tolist() == [VOCAB] * LENGTH
    assert kept[1].tolist() == [8] * LENGTH
    engine.pool.admit(1, seed=2)
    engine.pool.begin(torch.tensor([1]), torch.arange(LENGTH)[None])
    engine.step(1)
    assert seen == [[0, 8], None]
