"""``advance`` under ``reveal`` around a model that is a table, with everything a request may ask.

Positions see each other: the logits of a row follow from its position and from all tokens of its
canvas. What the model says of a row that has its token is poison: NaN. So nothing that follows can
have read it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_diffusion import grid
from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.constrain.automaton.slots import AutomatonSlots
from vllm_diffusion.constrain.constraints import Constraints
from vllm_diffusion.constrain.guard import Guards
from vllm_diffusion.constrain.table import ConstraintTable
from vllm_diffusion.denoise.constants import REVEAL_BY, RevealConstants
from vllm_diffusion.denoise.noise import AbsorbingNoise
from vllm_diffusion.family import Family, Text
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.records import CanvasBatch
from vllm_diffusion.rules import rule_for
from vllm_diffusion.step import advance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.constrain.guard import Guard
    from vllm_diffusion.records import CanvasStats, Decision, Emission

BLOCK, VOCAB, SLOTS, MASK = 8, 61, 6, 2
GRID = Family(
    name="grid", rule="reveal", mask_id=MASK, text=Text.BLOCK, block=BLOCK, banned=(MASK,)
)
WHOLE = Family(
    name="whole", rule="reveal", mask_id=MASK, text=Text.WHOLE, block=BLOCK, banned=(MASK,)
)
SDAR = RevealConstants(max_steps=BLOCK, reveal_threshold=0.85, reveal_by="drawn")
LLADA = RevealConstants(max_steps=BLOCK, reveal_threshold=0.0, reveal_by="model")
PUBLISHED = {"grid": (GRID, SDAR), "whole": (WHOLE, LLADA)}
NOTHING = Constraints()


def any_rule(seed: int) -> RevealConstants:
    """Any score, threshold and number of steps."""
    rng = random.Random(seed)
    by = rng.choice(REVEAL_BY)
    scored = by in {"drawn", "model", "margin"}
    return RevealConstants(
        max_steps=rng.choice([1, 2, 3, BLOCK]),
        reveal_threshold=rng.choice([0.0, 0.01, 0.2, 0.9]) if scored else 0.0,
        reveal_by=by,
    )


@cache
def tables(seed: int, vocab: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(vocab, vocab, generator=generator),
        torch.randn(512, vocab, generator=generator),
    )


class Engine:
    """The smallest loop around ``advance``: canvases one behind the other, in some slots."""

    def __init__(
        self,
        family: Family = GRID,
        rule: RevealConstants = SDAR,
        *,
        seed: int = 0,
        sharpness: float = 1.0,
        vocab: int = VOCAB,
    ) -> None:
        self.family, self.seed, self.sharpness, self.vocab = family, seed, sharpness, vocab
        assert family.mask_id is not None
        assert family.block is not None
        self.mask, self.block = family.mask_id, family.block
        cpu = torch.device("cpu")
        self.pool = CanvasPool(
            num_slots=SLOTS,
            canvas_length=self.block,
            hidden_size=None,
            vocab_size=vocab,
            constants=rule,
            noise=AbsorbingNoise(self.mask),
            dtype=torch.float32,
            device=cpu,
        )
        self.rule = rule_for(family, self.pool.noise, device_type="cpu")
        self.head = ReferenceHead(
            logits=lambda hidden: hidden.clone(),
            soft_embedding=None,
            max_rows=37,
            banned=family.banned,
        )
        self.table = ConstraintTable(canvas_length=self.block, vocab_size=vocab, device=cpu)
        self.guards = Guards()
        self.automata = AutomatonSlots(num_slots=SLOTS, device=cpu)
        self.text = torch.zeros(SLOTS, 512, dtype=torch.int64)
        self.prompt: dict[int, int] = {}
        self.start: dict[int, int] = {}
        self.decisions: list[tuple[CanvasStats, Decision]] = []

    def admit(
        self,
        slot: int = 0,
        *,
        seed: int = 0,
        start: int = 5,
        constraints: Constraints = NOTHING,
        rule: RevealConstants | None = None,
        guard: Guard | None = None,
        automaton: TokenAutomaton | None = None,
        budget: int = 1 << 20,
        fused: bool = False,
    ) -> None:
        self.guards.admit(slot, guard)
        self.automata.release(slot)
        if automaton is not None:
            name, behind = str(id(automaton)), start + budget
            self.automata.admit(slot, automaton, name=name, output=(), behind=behind)
        self.prompt[slot] = self.start[slot] = start
        self.table.admit(slot, constraints, prompt_length=start)
        self.pool.admit(slot, seed=seed, constants=rule, fused=fused)
        position = start + torch.arange(self.block)[None]
        self.pool.begin(torch.tensor([slot]), position)
        self._begin_from([slot], position, torch.tensor([True]))

    def logits(self, tokens: Tensor, start: int) -> Tensor:
        """[W, V], what the model says of a canvas, whatever it holds."""
        by_token, by_position = tables(self.seed, self.vocab)
        seen = by_token[tokens].mean(dim=0) + by_token[tokens.roll(1)]
        return self.sharpness * (seen + by_position[start : start + len(tokens)])

    def step(self, *slots: int) -> Emission:
        """One ``advance`` over some slots."""
        slots = slots or (0,)
        end = 1 << 20
        widths = [
            grid.canvas_width(self.family, known=self.start[slot], asked=self.block, end=end)
            for slot in slots
        ]
        hidden = torch.full((len(slots), self.block, self.vocab), torch.nan)
        for row, (slot, width) in enumerate(zip(slots, widths, strict=True)):
            tokens = self.pool.tokens[slot, :width]
            logits = self.logits(tokens, self.start[slot])
            hidden[row, :width] = logits.masked_fill(tokens[:, None] != self.mask, torch.nan)
        width = torch.tensor(widths)
        start = torch.tensor([self.start[slot] for slot in slots])
        batch = CanvasBatch(
            slots=torch.tensor(slots),
            width=width,
            position=start[:, None] + torch.arange(self.block),
            valid=torch.arange(self.block) < width[:, None],
        )
        rewrite = self.table.rewrite(
            slots,
            batch,
            text=self.text,
            argmax=self.pool.argmax,
            step=self.pool.step - self.pool.first_step,
            known=self.pool.known(batch.slots),
        )
        emission = advance(
            self.pool,
            batch,
            hidden,
            self.head,
            self.rule,
            rewrite=rewrite,
            automata=self.automata.canvases(slots, batch),
            guards=self.guards.of(slots),
            observe=lambda _, __, stats, decision: self.decisions.append((stats, decision)),
        )
        self.automata.advance(slots, batch, emission)
        for row, slot in enumerate(slots):
            first, count = self.start[slot], int(emission.count[row])
            self.text[slot, first : first + count] = emission.tokens[row, :count]
            self.start[slot] += count
        self._begin_from(slots, batch.position + emission.count[:, None], emission.count > 0)
        return emission

    def run(self, budget: int, slot: int = 0, *, most: int = 400) -> list[int]:
        """The first tokens of a slot's answer."""
        for _ in range(most):
            if self.start[slot] - self.prompt[slot] >= budget:
                return self.said(slot)[:budget]
            self.step(slot)
        raise AssertionError(f"{most} steps gave {self.start[slot] - self.prompt[slot]} tokens")

    def said(self, slot: int = 0) -> list[int]:
        """What has left."""
        return self.text[slot, self.prompt[slot] : self.start[slot]].tolist()

    def _begin_from(self, slots: Sequence[int], position: Tensor, begun: Tensor) -> None:
        first = self.table.first_input(slots, position)
        if first is not None:
            self.pool.begin_from(torch.tensor(slots), begun, *first)


def greedy(constraints: Constraints = NOTHING) -> Constraints:
    """The same at temperature 0."""
    return replace(constraints, temperature=0.0)
