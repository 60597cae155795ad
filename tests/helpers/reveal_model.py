"""``advance`` under ``reveal`` around a model that is a table; a loop in plain Python beside it.

Takes what a few slots run (``Asked``). Gives what each canvas went through, all slots together
(``Engine``) or a canvas by itself (``truth``). Every position of the table model sees every token
of its canvas, so a canvas that differs once differs in everything after.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.denoise.constants import REVEAL_BY, RevealConstants
from vllm_diffusion.denoise.noise import AbsorbingNoise
from vllm_diffusion.denoise.rng import Purpose, philox, split_seed, uniform
from vllm_diffusion.family import Family, Text
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.records import CanvasBatch, Emission, Noise, StopReason
from vllm_diffusion.rules import rule_for
from vllm_diffusion.step import advance

if TYPE_CHECKING:
    import random

    from vllm_diffusion.step import Observer

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
    ends: tuple[int, ...] = ()


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
        self.observe: Observer | None = None
        self.start = {slot: each.start for slot, each in asked.items()}
        for slot, each in asked.items():
            self.pool.admit(
                slot,
                seed=each.seed,
                constants=each.constants,
                fused=each.fused,
                ends=each.ends,
            )
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
        emission = advance(
            self.pool,
            batch,
            hidden,
            self.head,
            self.rule,
            rewrite=rewrite,
            observe=self.observe,
        )
        for row, slot in enumerate(slots):
            self.start[slot] += int(emission.count[row])
        return emission

    def run(self) -> dict[int, tuple[Went, list[int], int, int]]:
        """All slots until each has emitted a canvas: its steps, tokens, their number, reason."""
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
                    held = emission.tokens[row] if count else self.pool.tokens[slot]
                    went[slot].tokens.append(held[:width].tolist())
                if count:
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
        final = tokens[: [*tokens, MASK].index(MASK)]
        ends = [at for at, token in enumerate(final) if token in asked.ends]
        if ends or MASK not in tokens:
            tokens = tokens[: ends[0] + 1] if ends else tokens
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
        ends=tuple(rng.sample(range(8, VOCAB), rng.choice((0, 1, 4)))),
    )
