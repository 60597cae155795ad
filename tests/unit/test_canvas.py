"""The life of a canvas: admitted, begun, denoised, finished, committed, and handed to the next."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import for_each
from torch import Tensor

from vllm_diffusion.canvas import CanvasPool, ConstantTable
from vllm_diffusion.denoise.constants import (
    REVEAL_BY,
    EntropyBoundConstants,
    RevealConstants,
    declared,
)
from vllm_diffusion.denoise.noise import AbsorbingNoise
from vllm_diffusion.denoise.renoise import initial_canvas
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.records import (
    CanvasBatch,
    CanvasStats,
    Commit,
    Decision,
    Emission,
    StopReason,
)

SLOTS, LENGTH, HIDDEN, VOCAB = 5, 8, 4, 101

CONSTANTS = EntropyBoundConstants(
    max_steps=6,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    confidence_threshold=0.005,
    stability_threshold=2,
)

STATE = (
    "tokens",
    "argmax",
    "top_prob",
    "history",
    "soft_embedding",
    "step",
    "first_step",
    "causal",
    "fused",
    "seed",
)


def make_pool(
    constants: EntropyBoundConstants = CONSTANTS, remembered: int | None = None
) -> CanvasPool:
    return CanvasPool(
        num_slots=SLOTS,
        canvas_length=LENGTH,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        constants=constants,
        remembered=remembered,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def positions(*starts: int) -> Tensor:
    return torch.tensor(starts)[:, None] + torch.arange(LENGTH)


def make_batch(slots: list[int], starts: list[int], widths: list[int] | None = None) -> CanvasBatch:
    width = torch.tensor(widths or [LENGTH] * len(slots))
    return CanvasBatch(
        slots=torch.tensor(slots),
        width=width,
        position=positions(*starts),
        valid=torch.arange(LENGTH) < width[:, None],
    )


def make_stats(batch: CanvasBatch, fill: int) -> CanvasStats:
    shape = tuple(batch.position.shape)
    row = torch.arange(shape[0])[:, None] * 10
    return CanvasStats(
        argmax=(row + fill).expand(shape).clone(),
        sample=(row + fill + 1).expand(shape).clone(),
        entropy=torch.ones(shape),
        top_prob=torch.ones(shape),
        margin=torch.ones(shape),
        soft_embedding=torch.full((*shape, HIDDEN), float(fill)),
    )


def make_decision(batch: CanvasBatch, fill: int, next_token: int, *finished: bool) -> Decision:
    """Of a rule that commits the argmax of ``make_stats(batch, fill)``."""
    shape = batch.position.shape
    return Decision(
        accept=torch.zeros(shape, dtype=torch.bool),
        next_tokens=torch.full(shape, next_token),
        finished=torch.tensor(finished),
        reason=torch.full((shape[0],), StopReason.SETTLED),
        commit=Commit(tokens=make_stats(batch, fill).argmax),
    )


def snapshot(pool: CanvasPool, slot: int) -> dict[str, Tensor]:
    return {name: getattr(pool, name)[slot].clone() for name in STATE}


def assert_unchanged(pool: CanvasPool, slot: int, before: dict[str, Tensor]) -> None:
    for name, value in before.items():
        assert torch.equal(getattr(pool, name)[slot], value), f"slot {slot}: {name} changed"


def begun_pool(*slots: int, fused: bool = False) -> CanvasPool:
    pool = make_pool()
    for slot in slots:
        pool.admit(slot, seed=1000 + slot, fused=fused)
    pool.begin(torch.tensor(slots), positions(*(10 * slot for slot in slots)))
    return pool


def test_a_new_pool_is_causal_and_holds_the_constants() -> None:
    pool = make_pool()
    assert bool(pool.causal.all())
    assert pool.tokens.shape == pool.argmax.shape == (SLOTS, LENGTH)
    assert pool.history.shape == (SLOTS, CONSTANTS.stability_threshold, LENGTH)
    assert pool.soft_embedding.shape == (SLOTS, LENGTH, HIDDEN)
    of = pool.constants
    assert of.t_min.tolist() == [0.4] * SLOTS
    assert of.t_max.tolist() == [0.8] * SLOTS
    assert of.entropy_bound.tolist() == pytest.approx([0.1] * SLOTS)
    assert of.confidence_threshold.tolist() == pytest.approx([0.005] * SLOTS)


def test_admit_takes_the_slot_and_nothing_else() -> None:
    pool = begun_pool(0, 1, 2)
    before = {slot: snapshot(pool, slot) for slot in (0, 2)}
    pool.admit(1, seed=(7 << 32) + 9, constants=replace(CONSTANTS, max_steps=3))
    assert pool.seed[1].tolist() == [9, 7]
    assert int(pool.constants.max_steps[1]) == 3
    assert int(pool.step[1]) == 0
    assert bool(pool.causal[1])
    for slot, state in before.items():
        assert_unchanged(pool, slot, state)


def test_admit_takes_the_rule_of_the_request_and_forgets_the_last_owners() -> None:
    pool = make_pool()
    asked = EntropyBoundConstants(
        max_steps=2,
        t_min=0.1,
        t_max=0.9,
        entropy_bound=3.0,
        confidence_threshold=0.7,
        stability_threshold=0,
        hold_threshold=0.9,
        doubt_threshold=0.2,
    )
    for rule in (asked, CONSTANTS):
        pool.admit(0, seed=1, constants=None if rule == CONSTANTS else rule)
        held = {
            name: float(getattr(pool.constants, name)[0])
            for name in declared(EntropyBoundConstants)
        }
        assert held == pytest.approx({name: float(getattr(rule, name)) for name in held})


def test_the_pool_holds_the_place_of_a_name() -> None:
    rule = RevealConstants(max_steps=4, reveal_threshold=0.9, reveal_by="margin")
    table = ConstantTable(rule, num_slots=3, device=torch.device("cpu"))
    assert table.reveal_by.dtype == torch.int64
    table.put(1, replace(rule, reveal_by="drawn", reveal_threshold=0.5))
    assert [REVEAL_BY[place] for place in table.reveal_by.tolist()] == ["margin", "drawn", "margin"]
    assert table.reveal_threshold.tolist() == pytest.approx([0.9, 0.5, 0.9])


def test_a_pool_remembers_more_steps_than_its_own_rule_asks_for() -> None:
    pool = make_pool(CONSTANTS, remembered=4)
    assert pool.history.shape == (SLOTS, 4, LENGTH)
    assert pool.constants.stability_threshold.tolist() == [CONSTANTS.stability_threshold] * SLOTS
    pool.admit(0, seed=1, constants=replace(CONSTANTS, stability_threshold=4))
    assert int(pool.constants.stability_threshold[0]) == 4


def test_begin_draws_the_initial_canvas_of_the_slots_seed_and_position() -> None:
    pool = begun_pool(0, 3)
    for slot in (0, 3):
        expected = initial_canvas(
            torch.tensor([split_seed(1000 + slot)]), positions(10 * slot), VOCAB
        )
        assert torch.equal(pool.tokens[slot], expected[0])
    assert not bool(pool.causal[0])
    assert not bool(pool.causal[3])
    assert bool(pool.causal[1])


def test_a_denoising_step_takes_the_decision() -> None:
    pool = begun_pool(1, 3)
    others = {slot: snapshot(pool, slot) for slot in (0, 2, 4)}
    batch = make_batch([3, 1], [30, 10])
    emission = pool.apply(batch, make_stats(batch, 50), make_decision(batch, 50, 77, False, False))
    assert emission.count.tolist() == [0, 0]
    assert emission.steps.tolist() == [0, 0]
    assert pool.step[[3, 1]].tolist() == [1, 1]
    assert bool((pool.tokens[[3, 1]] == 77).all())
    assert bool((pool.argmax[3] == 50).all())
    assert bool((pool.argmax[1] == 60).all())
    assert bool((pool.soft_embedding[[3, 1]] == 50.0).all())
    assert not bool(pool.causal[[3, 1]].any())
    for slot, state in others.items():
        assert_unchanged(pool, slot, state)


def test_history_holds_the_latest_steps_oldest_first() -> None:
    pool = begun_pool(2)
    batch = make_batch([2], [20])
    seen = []
    for fill in (5, 6, 7):
        pool.apply(batch, make_stats(batch, fill), make_decision(batch, fill, 0, False))
        seen.append(pool.history[2, :, 0].tolist())
    assert seen == [[-1, 5], [5, 6], [6, 7]]


def test_a_finished_canvas_turns_causal_with_its_argmax_as_input() -> None:
    pool = begun_pool(0, 1)
    batch = make_batch([0, 1], [0, 10])
    emission = pool.apply(batch, make_stats(batch, 30), make_decision(batch, 30, 77, True, False))
    assert emission.count.tolist() == [0, 0], "its KV is not written yet, so nothing is emitted"
    assert pool.causal[[0, 1]].tolist() == [True, False]
    assert bool((pool.tokens[0] == 30).all())
    assert bool((pool.tokens[1] == 77).all())
    # The commit forward takes plain embeddings; a belief left here would reach the next canvas.
    assert bool((pool.soft_embedding[0] == 0).all())
    assert bool((pool.soft_embedding[1] == 30).all())


def test_a_commit_emits_the_argmax_and_begins_the_next_canvas_behind_it() -> None:
    pool = begun_pool(2)
    batch = make_batch([2], [20])
    for finished in (False, True):
        pool.apply(batch, make_stats(batch, 40), make_decision(batch, 40, 77, finished))
    # What the head and the rule say of commit rows is noise: a commit row has no distribution.
    garbage = replace(
        make_stats(batch, 99), soft_embedding=torch.full((1, LENGTH, HIDDEN), torch.nan)
    )
    emission = pool.apply(batch, garbage, make_decision(batch, 0, 88, True))
    assert emission.tokens.tolist() == [[40] * LENGTH]
    assert emission.count.tolist() == [LENGTH]
    assert emission.steps.tolist() == [2]
    expected = initial_canvas(torch.tensor([split_seed(1002)]), positions(20 + LENGTH), VOCAB)
    assert torch.equal(pool.tokens[2], expected[0])
    assert int(pool.step[2]) == 0
    assert bool((pool.history[2] == -1).all())
    assert bool((pool.soft_embedding[2] == 0).all())
    assert not bool(pool.causal[2])


def test_a_commit_tells_the_reason_and_entropy_of_the_canvass_last_step() -> None:
    pool = begun_pool(0, 1)
    batch = make_batch([0, 1], [0, 10], [LENGTH, 3])
    for step, nats in enumerate((9.0, 2.0)):
        entropy = torch.full((2, LENGTH), nats)
        entropy[1, :3] = torch.tensor([0.5, 0.25, 0.0])  # beyond its width it does not count
        decision = replace(
            make_decision(batch, 40, 77, step == 1, step == 1),
            reason=torch.tensor([StopReason.STEPS, StopReason.SETTLED]),
        )
        pool.apply(batch, replace(make_stats(batch, 40), entropy=entropy), decision)
    # What the commit rows themselves say is noise.
    noise = replace(make_stats(batch, 99), entropy=torch.full((2, LENGTH), torch.nan))
    emission = pool.apply(batch, noise, replace(decision, reason=torch.zeros(2).long()))
    assert emission.steps.tolist() == [2, 2]
    assert emission.reason.tolist() == [StopReason.STEPS, StopReason.SETTLED]
    assert emission.entropy.tolist() == [2.0, 0.25]


def test_a_commit_equals_a_fresh_begin_at_the_same_place() -> None:
    pool = begun_pool(2)
    batch = make_batch([2], [20])
    for finished in (True, False):
        pool.apply(batch, make_stats(batch, 40), make_decision(batch, 40, 77, finished))
    fresh = make_pool()
    fresh.admit(2, seed=1002)
    fresh.begin(torch.tensor([2]), positions(20 + LENGTH))
    for name in set(STATE) - {"argmax"}:
        assert torch.equal(getattr(pool, name)[2], getattr(fresh, name)[2]), name


def test_denoising_finishing_and_committing_slots_share_a_batch() -> None:
    def history_of(slot: int, together: bool) -> list[dict[str, Tensor]]:
        """Slot 0 commits, 1 finishes and 2 denoises in step 1; each alone or all at once."""
        pool, states = begun_pool(0, 1, 2), []
        for fill, finished in ((11, (True, False, False)), (12, (False, True, False))):
            slots = [0, 1, 2] if together else [slot]
            batch = make_batch(slots, [10 * s for s in slots])
            stats = make_stats(batch, fill)
            row = torch.tensor(slots)[:, None]
            stats = replace(stats, argmax=(row + fill).expand(len(slots), LENGTH))
            decision = make_decision(batch, fill, 70, *(finished[s] for s in slots))
            pool.apply(batch, stats, replace(decision, commit=Commit(tokens=stats.argmax)))
            states.append(snapshot(pool, slot))
        return states

    for slot in range(3):
        for alone, mixed in zip(history_of(slot, False), history_of(slot, True), strict=True):
            assert all(torch.equal(alone[name], mixed[name]) for name in STATE)


@for_each(width=[1, 3, LENGTH - 1])
def test_a_narrow_commit_emits_its_width_and_goes_on_behind_it(width: int) -> None:
    pool = begun_pool(0)
    batch = make_batch([0], [0], [width])
    pool.apply(batch, make_stats(batch, 40), make_decision(batch, 40, 77, True))
    emission = pool.apply(batch, make_stats(batch, 99), make_decision(batch, 99, 88, False))
    assert emission.count.tolist() == [width]
    expected = initial_canvas(torch.tensor([split_seed(1000)]), positions(width), VOCAB)
    assert torch.equal(pool.tokens[0], expected[0])


@pytest.mark.parametrize("left_in", ["denoising", "finished", "committed"])
def test_what_an_aborted_request_leaves_behind_does_not_reach_the_next(left_in: str) -> None:
    pool = begun_pool(3)
    batch = make_batch([3], [30])
    for finished in {"denoising": [False], "finished": [True], "committed": [True, False]}[left_in]:
        pool.apply(batch, make_stats(batch, 64), make_decision(batch, 64, 77, finished))
    fresh = make_pool()
    for each in (pool, fresh):
        each.admit(3, seed=5)
        assert bool(each.causal[3]), "a new request's first rows are prompt rows"
        each.begin(torch.tensor([3]), positions(4))
    for name in set(STATE) - {"argmax"}:
        assert torch.equal(getattr(pool, name)[3], getattr(fresh, name)[3]), name
    # The stale argmax may stay: it is written by every step before a commit reads it.
    batch = make_batch([3], [4])
    for each in (pool, fresh):
        each.apply(batch, make_stats(batch, 20), make_decision(batch, 20, 21, True))
    assert torch.equal(pool.argmax[3], fresh.argmax[3])


def test_confidence_alone_needs_no_history() -> None:
    pool = make_pool(replace(CONSTANTS, stability_threshold=0))
    pool.admit(0, seed=1)
    pool.begin(torch.tensor([0]), positions(0))
    batch = make_batch([0], [0])
    pool.apply(batch, make_stats(batch, 3), make_decision(batch, 3, 4, False))
    assert pool.history.shape == (SLOTS, 0, LENGTH)
    assert bool((pool.tokens[0] == 4).all())


def test_soft_embeddings_are_kept_in_the_models_dtype() -> None:
    pool = CanvasPool(
        num_slots=1,
        canvas_length=LENGTH,
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        constants=CONSTANTS,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    pool.admit(0, seed=1)
    pool.begin(torch.tensor([0]), positions(0))
    batch = make_batch([0], [0])
    pool.apply(batch, make_stats(batch, 3), make_decision(batch, 3, 4, False))
    assert pool.soft_embedding.dtype == torch.bfloat16


def test_a_belief_that_is_no_number_is_dropped() -> None:
    pool, batch = begun_pool(0), make_batch([0], [0])
    stats = make_stats(batch, 3)
    for place, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        stats.soft_embedding[0, 1, place] = value
    pool.apply(batch, stats, make_decision(batch, 0, 4, False))
    assert pool.soft_embedding[0, 1].tolist() == [0, 0, 0, 3]
    assert bool((pool.soft_embedding[0, 0] == 3).all())


def test_a_slot_has_an_owner_until_it_is_released() -> None:
    pool, other = make_pool(), replace(CONSTANTS, soft_embedding_top_k=8)
    pool.admit(1, seed=1, constants=other)
    pool.admit(2, seed=1)
    assert pool.owners == {1: other, 2: CONSTANTS}
    pool.begin(torch.tensor([1]), positions(0))
    pool.release(1)
    assert bool(pool.causal[1])
    assert pool.owners == {2: CONSTANTS}


def finish_and_commit(pool: CanvasPool, commit: Commit) -> tuple[CanvasBatch, Emission]:
    """One step of slots 0 and 1, which finish; then the forward that commits them."""
    batch = make_batch([0, 1], [0, 10])
    decision = replace(make_decision(batch, 0, 77, True, True), commit=commit)
    pool.apply(batch, make_stats(batch, 30), decision)
    return batch, pool.apply(
        batch, make_stats(batch, 99), make_decision(batch, 99, 88, False, False)
    )


def test_a_decision_may_commit_a_part_and_the_next_canvas_begins_behind_it() -> None:
    pool = begun_pool(0, 1)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    commit = Commit(tokens=tokens, rows=tokens % LENGTH, count=torch.tensor([3, LENGTH]))
    batch, emission = finish_and_commit(pool, commit)
    assert emission.count.tolist() == [3, LENGTH]
    assert torch.equal(emission.tokens, tokens)
    behind = positions(3, 10 + LENGTH)
    assert torch.equal(pool.tokens[[0, 1]], initial_canvas(pool.seed[[0, 1]], behind, VOCAB))
    assert bool((pool.argmax[0] == 30).all()), "the guess is the model's, not what was committed"
    # Nothing of it is left for the canvas that follows.
    again = make_batch([0, 1], [3, 10 + LENGTH])
    pool.apply(again, make_stats(batch, 40), make_decision(batch, 40, 0, True, True))
    emission = pool.apply(again, make_stats(batch, 99), make_decision(batch, 99, 0, False, False))
    assert emission.count.tolist() == [LENGTH, LENGTH]
    assert pool.rows[0].tolist() == list(range(LENGTH))


def test_what_is_committed_is_the_input_of_the_commit_forward() -> None:
    pool = begun_pool(0, 1)
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    batch = make_batch([0, 1], [0, 10])
    commit = Commit(tokens=tokens, rows=tokens % LENGTH, count=torch.tensor([3, LENGTH]))
    decision = replace(make_decision(batch, 0, 77, True, False), commit=commit)
    pool.apply(batch, make_stats(batch, 30), decision)
    assert torch.equal(pool.tokens[0], tokens[0])
    assert bool((pool.tokens[1] == 77).all()), "a canvas that goes on takes no notice"


def test_a_canvas_may_begin_from_a_draft_within_its_schedule() -> None:
    pool = begun_pool(0, 1, 2)
    noise = pool.tokens.clone()
    slots, draft = torch.tensor([1, 2]), torch.tensor([[5, -1] * 4, [6] * LENGTH])
    before = snapshot(pool, 2)
    pool.begin_from(slots, torch.tensor([True, False]), draft, torch.tensor([4, 5]))
    assert_unchanged(pool, 2, before)
    assert pool.tokens[1].tolist() == torch.where(draft[0] >= 0, draft[0], noise[1]).tolist()
    assert (int(pool.step[1]), int(pool.first_step[1])) == (4, 4)
    # Steps are counted from there, and the next canvas begins at the first again.
    batch = make_batch([1], [10])
    pool.apply(batch, make_stats(batch, 30), make_decision(batch, 30, 77, True))
    emission = pool.apply(batch, make_stats(batch, 99), make_decision(batch, 99, 88, False))
    assert int(emission.steps[0]) == 1
    assert (int(pool.step[1]), int(pool.first_step[1])) == (0, 0)


@pytest.mark.parametrize("leave", ["admit", "begin"])
def test_a_slot_forgets_the_draft_of_its_last_owner(leave: str) -> None:
    pool = begun_pool(0)
    slot = torch.tensor([0])
    given = torch.full((1, LENGTH), 5)
    pool.begin_from(slot, torch.tensor([True]), given, torch.tensor([4]))
    if leave == "admit":
        pool.admit(0, seed=1)
    else:
        pool.begin(slot, positions(0))
    assert (int(pool.step[0]), int(pool.first_step[0])) == (0, 0)


def test_a_fused_canvas_leaves_in_its_last_step_and_the_next_begins_behind_it() -> None:
    pool = begun_pool(0, 1, fused=True)
    batch = make_batch([0, 1], [0, 10], [LENGTH, 3])
    entropy = torch.full((2, LENGTH), 2.0)
    entropy[1, :3] = torch.tensor([0.5, 0.25, 0.0])
    for finished in (False, True):
        decision = replace(
            make_decision(batch, 30, 77, False, finished),
            reason=torch.tensor([StopReason.STEPS, StopReason.STEPS]),
        )
        emission = pool.apply(batch, replace(make_stats(batch, 30), entropy=entropy), decision)
        assert emission.count.tolist() == [0, 3 * finished]
    assert emission.tokens[1].tolist() == [40] * LENGTH
    assert emission.steps.tolist() == [0, 2]
    assert int(emission.reason[1]) == StopReason.STEPS
    assert float(emission.entropy[1]) == 0.25
    assert pool.causal[[0, 1]].tolist() == [False, False]
    expected = initial_canvas(pool.seed[[1]], positions(13), VOCAB)
    assert torch.equal(pool.tokens[[1]], expected)
    assert pool.step[[0, 1]].tolist() == [2, 0]
    assert bool((pool.history[1] == -1).all())
    assert bool((pool.soft_embedding[1] == 0).all())
    assert bool((pool.tokens[0] == 77).all())
    assert bool((pool.soft_embedding[0] == 30).all())


def test_a_fused_slot_of_a_draft_counts_its_steps_from_there() -> None:
    pool = begun_pool(1, fused=True)
    slots, batch = torch.tensor([1]), make_batch([1], [10])
    pool.begin_from(slots, torch.tensor([True]), torch.full((1, LENGTH), 5), torch.tensor([4]))
    emission = pool.apply(batch, make_stats(batch, 30), make_decision(batch, 30, 77, True))
    assert emission.steps.tolist() == [1]
    assert (int(pool.step[1]), int(pool.first_step[1])) == (0, 0)


def test_fused_and_separate_slots_end_alike_a_forward_apart() -> None:
    pool = begun_pool(0, 1)
    pool.fused[1] = True
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH)
    commit = Commit(tokens=tokens, rows=tokens % LENGTH, count=torch.tensor([3, 5]))
    batch = make_batch([0, 1], [0, 10])
    decision = replace(make_decision(batch, 0, 77, True, True), commit=commit)
    first = pool.apply(batch, make_stats(batch, 30), decision)
    assert first.count.tolist() == [0, 5]
    assert torch.equal(first.tokens[1], tokens[1])
    begun = snapshot(pool, 1)
    alone = make_batch([0], [0])
    second = pool.apply(alone, make_stats(alone, 99), make_decision(alone, 99, 88, False))
    assert second.count.tolist() == [3]
    assert_unchanged(pool, 1, begun)
    behind = initial_canvas(pool.seed[[0, 1]], positions(3, 15), VOCAB)
    assert torch.equal(pool.tokens[[0, 1]], behind)


def test_a_slot_forgets_that_its_last_owner_was_fused() -> None:
    pool = begun_pool(0, fused=True)
    pool.admit(0, seed=1)
    assert not bool(pool.fused[0])


def test_the_probability_of_the_last_argmax_is_forgotten_with_its_canvas() -> None:
    pool = begun_pool(1, 3)
    batch = make_batch([1, 3], [10, 30])
    assert not bool(pool.top_prob.any())
    pool.apply(batch, make_stats(batch, 5), make_decision(batch, 5, 7, True, False))
    assert pool.top_prob[[1, 3]].tolist() == [[1.0] * LENGTH] * 2
    # Slot 1 commits, and its next canvas begins.
    pool.apply(batch, make_stats(batch, 5), make_decision(batch, 5, 7, False, False))
    assert not bool(pool.top_prob[1].any())
    assert bool(pool.top_prob[3].all())
    pool.begin(torch.tensor([3]), positions(30))
    assert not bool(pool.top_prob[3].any())


def test_a_model_that_is_not_conditioned_on_itself_has_no_soft_embedding() -> None:
    pool = CanvasPool(
        num_slots=SLOTS,
        canvas_length=LENGTH,
        hidden_size=None,
        vocab_size=VOCAB,
        constants=CONSTANTS,
        noise=AbsorbingNoise(7),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    pool.admit(0, seed=1)
    batch = make_batch([0], [0])
    pool.begin(batch.slots, batch.position)
    assert pool.tokens[0].tolist() == [7] * LENGTH
    stats = replace(make_stats(batch, 3), soft_embedding=None)
    pool.apply(batch, stats, make_decision(batch, 3, 4, False))
    assert pool.soft_embedding is None
    assert pool.tokens[0].tolist() == [4] * LENGTH
