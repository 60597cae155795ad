"""``advance`` under ``reveal`` on a model that is a table, against a loop in plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers.cases import for_each
from helpers.frequencies import assert_frequencies
from torch import Tensor

from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.denoise.constants import REVEAL_BY, RevealConstants
from vllm_diffusion.denoise.noise import AbsorbingNoise, UniformNoise
from vllm_diffusion.denoise.rng import Purpose, philox, split_seed, uniform
from vllm_diffusion.family import Family, Text
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.records import CanvasBatch, CanvasStats, Emission, Noise, StopReason
from vllm_diffusion.rules import rule_for
from vllm_diffusion.rules.reveal import Reveal
from vllm_diffusion.step import advance

LENGTH, VOCAB, SLOTS, MASK = 8, 61, 6, 7
ONE_A_STEP = RevealConstants(max_steps=LENGTH, reveal_threshold=0.0, reveal_by="model")
GRID = Family(
    name="grid", rule="reveal", mask_id=MASK, text=Text.BLOCK, block=LENGTH, banned=(MASK,)
)
WHOLE = Family(
    name="whole", rule="reveal", mask_id=MASK, text=Text.WHOLE, block=LENGTH, banned=(MASK,)
)
FAMILIES = {"grid": GRID, "whole": WHOLE}

_GENERATOR = torch.Generator().manual_seed(5)
BY_TOKEN = torch.randn(VOCAB, VOCAB, generator=_GENERATOR)
BY_POSITION = 2.0 * torch.randn(128, VOCAB, generator=_GENERATOR)


def logits_of(tokens: Tensor, start: int) -> Tensor:
    """[W, V]: every position sees every token of its canvas, and the mask is a likely one."""
    seen = BY_TOKEN[tokens].sum(dim=0) + BY_POSITION[start : start + len(tokens)]
    logits = seen + BY_TOKEN[tokens]
    logits[:, MASK] += 3.0
    return logits


def head_of(max_rows: int = 37) -> ReferenceHead:
    return ReferenceHead(
        logits=lambda hidden: hidden.clone(),
        soft_embedding=lambda prob: prob,
        max_rows=max_rows,
        banned=(MASK,),
    )


def pool_of(
    constants: RevealConstants = ONE_A_STEP, slots: int = SLOTS, length: int = LENGTH
) -> CanvasPool:
    return CanvasPool(
        num_slots=slots,
        canvas_length=length,
        hidden_size=None,
        vocab_size=VOCAB,
        constants=constants,
        noise=AbsorbingNoise(MASK),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@dataclass
class Asked:
    """What one slot runs."""

    constants: RevealConstants
    seed: int
    start: int
    width: int = LENGTH
    given: tuple[int, ...] = ()
    first: int = 0
    greedy: bool = False
    temperature: float = 1.0
    fused: bool = False


@dataclass
class Went:
    """What its canvas went through: what was revealed step by step, and the tokens after each."""

    revealed: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class Engine:
    """The smallest loop around ``advance``: any canvases together, each until it is emitted."""

    def __init__(self, family: Family, asked: dict[int, Asked]) -> None:
        self.asked, self.pool = asked, pool_of()
        self.rule = rule_for(family, self.pool.noise, device_type="cpu")
        self.head = head_of()
        self.start = {slot: each.start for slot, each in asked.items()}
        for slot, each in asked.items():
            self.pool.admit(slot, seed=each.seed, constants=each.constants, fused=each.fused)
            position = each.start + torch.arange(LENGTH)[None]
            self.pool.begin(torch.tensor([slot]), position)
            given = [*each.given, *[-1] * (LENGTH - len(each.given))]
            self.pool.begin_from(
                torch.tensor([slot]),
                torch.tensor([True]),
                torch.tensor([given]),
                torch.tensor([each.first]),
            )

    def step(self, *slots: int) -> Emission:
        """One ``advance``; rows beyond a width hold NaN, which must reach nothing."""
        mine = [self.asked[slot] for slot in slots]
        hidden = torch.full((len(slots), LENGTH, VOCAB), torch.nan)
        for row, slot in enumerate(slots):
            width = self.asked[slot].width
            hidden[row, :width] = logits_of(self.pool.tokens[slot, :width], self.start[slot])
        width = torch.tensor([each.width for each in mine])
        start = torch.tensor([self.start[slot] for slot in slots])
        rewrite = Rewrite(
            canvas=torch.arange(len(slots)).repeat_interleave(LENGTH),
            temperature=torch.tensor([each.temperature for each in mine]),
            greedy=torch.tensor([each.greedy for each in mine]),
        )
        batch = CanvasBatch(
            slots=torch.tensor(slots),
            width=width,
            position=start[:, None] + torch.arange(LENGTH),
            valid=torch.arange(LENGTH) < width[:, None],
        )
        emission = advance(self.pool, batch, hidden, self.head, self.rule, rewrite=rewrite)
        for row, slot in enumerate(slots):
            self.start[slot] += int(emission.count[row])
        return emission

    def run(self) -> dict[int, tuple[Went, list[int], int, int]]:
        """All slots until each has emitted a canvas: steps, tokens, their number, reason."""
        went = {slot: Went() for slot in self.asked}
        out: dict[int, tuple[Went, list[int], int, int]] = {}
        while len(out) < len(self.asked):
            slots = [slot for slot in self.asked if slot not in out]
            causal = self.pool.causal.tolist()
            emission = self.step(*slots)
            assert emission.revealed is not None
            for row, slot in enumerate(slots):
                width, count = self.asked[slot].width, int(emission.count[row])
                said = emission.tokens[row, :count].tolist()
                if causal[slot]:
                    assert not bool(emission.revealed[row].any())
                else:
                    places = emission.revealed[row].nonzero()[:, 0].tolist()
                    went[slot].revealed.append(places)
                    # A fused slot already holds the next canvas where it emits.
                    went[slot].tokens.append(said or self.pool.tokens[slot, :width].tolist())
                if count:
                    assert count == width
                    steps, reason = int(emission.steps[row]), int(emission.reason[row])
                    out[slot] = went[slot], said, steps, reason
        return out


def truth(asked: Asked, family: Family) -> tuple[Went, list[int], int, int]:
    """The same canvas by itself, position by position."""
    width, steps = asked.width, asked.constants.max_steps
    tokens = [*asked.given, *[-1] * (width - len(asked.given))][:width]
    tokens = [MASK if token < 0 else token for token in tokens]
    went = Went()
    for step in range(asked.first, steps):
        logits = logits_of(torch.tensor(tokens), asked.start)
        logits[:, MASK] = -math.inf
        own = logits.softmax(-1)
        drawn_from = (logits / asked.temperature).softmax(-1)
        key = Noise(
            seed=torch.tensor([split_seed(asked.seed)]).expand(width, 2),
            position=asked.start + torch.arange(width),
            step=torch.full((width,), step),
        )
        rows = Rows(hidden=logits, temperature=torch.full((width,), asked.temperature), noise=key)
        sample = head_of(1)(rows).sample.tolist()
        chance = uniform(philox(key.seed, key.position, key.step, Purpose.REVEAL)[0]).tolist()
        score = {}
        for at in range(width):
            p = drawn_from[at].tolist()
            token = p.index(max(p)) if asked.greedy else sample[at]
            sample[at] = token
            best = sorted(p, reverse=True)
            score[at] = {
                "drawn": p[token],
                "model": float(own[at, token]),
                "entropy": sum(q * math.log(q) for q in p if q > 0),
                "margin": best[0] - best[1],
                "random": chance[at],
                "leftmost": -at,
            }[asked.constants.reveal_by]
        places = [at for at in range(width) if tokens[at] == MASK]
        if family is GRID:
            least = LENGTH // steps + (step < LENGTH % steps)
        else:
            least = math.ceil(len(places) / (steps - step))
        least = len(places) if step == steps - 1 else min(least, len(places))
        tau = asked.constants.reveal_threshold
        chosen = [at for at in places if tau and score[at] > tau]
        if len(chosen) < least:
            chosen = sorted(places, key=lambda at: -score[at])[:least]
        for at in chosen:
            tokens[at] = sample[at]
        went.revealed.append(sorted(chosen))
        went.tokens.append(list(tokens))
        if MASK not in tokens:
            break
    reason = StopReason.STEPS if step == steps - 1 else StopReason.SETTLED
    return went, tokens, len(went.tokens), int(reason)


def random_request(rng: random.Random, slot: int) -> Asked:
    by = rng.choice(REVEAL_BY)
    tau = rng.choice((0.0, 0.3, 0.6, 0.9)) if by in {"drawn", "model", "margin"} else 0.0
    steps = rng.choice((1, 2, 3, 5, 8, 11))
    width = rng.choice((1, 3, 5, LENGTH, LENGTH))
    given = [rng.choice((-1, -1, rng.randrange(8, VOCAB))) for _ in range(width)]
    greedy = rng.random() < 0.4
    return Asked(
        constants=RevealConstants(max_steps=steps, reveal_threshold=tau, reveal_by=by),
        seed=rng.randrange(2**64),
        start=rng.randrange(60) + slot,
        width=width,
        given=tuple(given) if rng.random() < 0.5 else (),
        first=rng.randrange(steps) if rng.random() < 0.2 else 0,
        greedy=greedy,
        temperature=1.0 if greedy else rng.choice((0.5, 1.0, 1.7)),
        fused=rng.random() < 0.5,
    )


@for_each(seed=range(40), name=FAMILIES)
def test_canvases_of_a_mixed_batch_equal_the_loop(seed: int, name: str) -> None:
    rng, family = random.Random(seed), FAMILIES[name]
    asked = {slot: random_request(rng, slot) for slot in range(rng.randint(1, SLOTS))}
    found = Engine(family, asked).run()
    for slot, each in asked.items():
        assert found[slot] == truth(each, family), each


@for_each(by=REVEAL_BY, name=FAMILIES, greedy=[True, False])
def test_every_score_reveals_one_position_a_step(by: str, name: str, greedy: bool) -> None:
    asked = Asked(replace(ONE_A_STEP, reveal_by=by), seed=3, start=20, greedy=greedy)
    family = FAMILIES[name]
    went, tokens, steps, reason = Engine(family, {2: asked}).run()[2]
    assert (went, tokens, steps, reason) == truth(asked, family)
    assert (steps, reason) == (LENGTH, StopReason.STEPS)
    assert sorted(at for [at] in went.revealed) == list(range(LENGTH))
    if by == "leftmost":
        assert went.revealed == [[at] for at in range(LENGTH)]


def test_the_orders_differ() -> None:
    orders = {
        by: str(
            Engine(GRID, {0: Asked(replace(ONE_A_STEP, reveal_by=by), 3, 20, temperature=1.7)})
            .run()[0][0]
            .revealed
        )
        for by in REVEAL_BY
    }
    assert len(set(orders.values())) == len(REVEAL_BY)


@for_each(width=[1, 3, 7])
def test_a_short_canvas_of_a_grid_keeps_the_blocks_schedule(width: int) -> None:
    constants = replace(ONE_A_STEP, max_steps=2)
    asked = Asked(constants, seed=1, start=8 - width, width=width)
    went, *_ = Engine(GRID, {0: asked}).run()[0]
    assert [len(places) for places in went.revealed] == ([4, width - 4] if width > 4 else [width])


def test_a_revealed_token_never_changes_and_no_mask_is_ever_said() -> None:
    for seed in range(20):
        asked = random_request(random.Random(seed), 0)
        went, tokens, *_ = Engine(WHOLE, {0: asked}).run()[0]
        assert MASK not in tokens
        for before, after in zip(went.tokens, went.tokens[1:], strict=False):
            assert all(new == old for old, new in zip(before, after, strict=True) if old != MASK)


def test_given_text_is_closed_from_the_first_step_on() -> None:
    given = (-1, 33, -1, -1, 12, -1, 40, 9)
    for family in (GRID, WHOLE):
        asked = Asked(ONE_A_STEP, seed=1, start=8, given=given)
        engine = Engine(family, {0: asked})
        assert torch.equal(engine.pool.argmax, engine.pool.tokens)
        went, tokens, steps, reason = engine.run()[0]
        assert [at for [at] in went.revealed] == sorted(
            (0, 2, 3, 5), key=lambda at: went.revealed.index([at])
        )
        assert (steps, reason) == (4, StopReason.SETTLED)
        assert all(said == asked for said, asked in zip(tokens, given, strict=True) if asked >= 0)


def test_a_canvas_that_is_given_whole_ends_at_once() -> None:
    given = tuple(range(10, 10 + LENGTH))
    went, tokens, steps, _ = Engine(GRID, {0: Asked(ONE_A_STEP, 1, 8, given=given)}).run()[0]
    assert (went.revealed, tuple(tokens), steps) == ([[]], given, 1)


def test_the_next_canvas_begins_open() -> None:
    for fused in (False, True):
        asked = Asked(replace(ONE_A_STEP, max_steps=1), seed=1, start=16, fused=fused)
        engine = Engine(GRID, {3: asked})
        first = engine.run()[3][1]
        assert engine.pool.tokens[3].tolist() == [MASK] * LENGTH
        assert engine.start[3] == 16 + LENGTH
        second = engine.run()[3]
        assert second[1] == truth(replace(asked, start=16 + LENGTH), GRID)[1] != first


def test_a_waiting_canvas_holds_what_it_commits() -> None:
    engine = Engine(GRID, {1: Asked(replace(ONE_A_STEP, max_steps=1), seed=1, start=16)})
    emission = engine.step(1)
    assert int(emission.count[0]) == 0
    assert bool(engine.pool.causal[1])
    said = engine.pool.tokens[1].tolist()
    assert MASK not in said
    assert engine.step(1).tokens[0].tolist() == said


def test_a_row_that_is_not_a_number_says_no_mask() -> None:
    for mask, said in ((MASK, 0), (0, 1)):
        pool = pool_of()
        pool.noise = AbsorbingNoise(mask)
        pool.admit(0, seed=1)
        batch = CanvasBatch(
            slots=torch.tensor([0]),
            width=torch.tensor([LENGTH]),
            position=torch.arange(LENGTH)[None],
            valid=torch.ones(1, LENGTH, dtype=torch.bool),
        )
        pool.begin(batch.slots, batch.position)
        stats = CanvasStats.zeros(
            torch.zeros(LENGTH, 1), self_conditioning=False, own_prob=True
        ).reshape(1, LENGTH)
        stats = replace(
            stats,
            sample=torch.full((1, LENGTH), mask),
            own_prob=torch.full((1, LENGTH), torch.nan),
        )
        decision = Reveal(AbsorbingNoise(mask), block=LENGTH).decide(pool, batch, stats)
        assert decision.accept[0].tolist() == [True] + [False] * (LENGTH - 1)
        assert decision.next_tokens[0].tolist() == [said] + [mask] * (LENGTH - 1)


def test_only_the_probabilities_that_some_request_needs_are_asked_for() -> None:
    pool, rule = pool_of(), Reveal(AbsorbingNoise(MASK))
    assert rule.probabilities(pool) == (False, False)
    for slot, by in enumerate(("entropy", "drawn", "model")):
        pool.admit(slot, seed=1, constants=replace(ONE_A_STEP, reveal_by=by))
    assert rule.probabilities(pool) == (True, True)
    pool.release(1)
    assert rule.probabilities(pool) == (False, True)


def test_no_canvas_that_did_not_run_reveals_anything() -> None:
    engine = Engine(GRID, {0: Asked(ONE_A_STEP, 1, 8), 1: Asked(ONE_A_STEP, 2, 8)})
    stats = CanvasStats.zeros(torch.zeros(2 * LENGTH, 1), own_prob=True).reshape(2, LENGTH)
    batch = CanvasBatch(
        slots=torch.tensor([0, 1]),
        width=torch.full((2,), LENGTH),
        position=(8 + torch.arange(LENGTH)).expand(2, LENGTH),
        valid=torch.ones(2, LENGTH, dtype=torch.bool),
        idle=torch.tensor([True, False]),
    )
    decision = engine.rule.decide(engine.pool, batch, stats)
    emission = engine.pool.apply(batch, stats, decision)
    assert emission.revealed is not None
    assert emission.revealed.any(dim=1).tolist() == [False, True]


def test_only_masks_can_be_revealed() -> None:
    with pytest.raises(AssertionError, match="only masks"):
        Reveal(UniformNoise(VOCAB))


@for_each(temperature=[0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_the_model_and_the_request_say(temperature: float) -> None:
    slots, length = 1500, 4
    constants = replace(ONE_A_STEP, max_steps=1)
    pool = pool_of(constants, slots, length)
    for slot in range(slots):
        pool.admit(slot, seed=slot)
    batch = CanvasBatch(
        slots=torch.arange(slots),
        width=torch.full((slots,), length),
        position=torch.arange(length).expand(slots, length),
        valid=torch.ones(slots, length, dtype=torch.bool),
    )
    pool.begin(batch.slots, batch.position)
    logits = logits_of(torch.full((length,), MASK), 0)
    rewrite = Rewrite(
        canvas=torch.arange(slots).repeat_interleave(length),
        temperature=torch.full((slots,), temperature),
    )
    hidden = logits.expand(slots, length, VOCAB)
    rule = Reveal(pool.noise, block=length)
    advance(pool, batch, hidden, head_of(4096), rule, rewrite=rewrite)
    logits[:, MASK] = -math.inf
    for at in range(length):
        assert_frequencies(pool.tokens[:, at], (logits[at] / temperature).softmax(-1))
