"""``advance`` around a model that is a table, and the published loop around the same model.

Takes a rule, a seed and where a canvas stands. Gives its trace, ours (``Engine``) or Transformers'
(``published``), to be compared canvas by canvas and token by token. The model is a table: logits of
a position follow from the token that stands there, the position, the step and the self-conditioning
of the step before. So a canvas that differs once differs in everything after, and no forward is
needed.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationMixin,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
    StableAndConfidentStoppingCriteria,
)

from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.constrain.automaton.slots import AutomatonSlots
from vllm_diffusion.constrain.constraints import Constraints
from vllm_diffusion.constrain.guard import Guard, Guards
from vllm_diffusion.constrain.table import ConstraintTable
from vllm_diffusion.denoise.constants import EntropyBoundConstants
from vllm_diffusion.denoise.noise import UniformNoise
from vllm_diffusion.denoise.renoise import initial_canvas, uniform_tokens
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.sample import sample_rows
from vllm_diffusion.models.diffusion_gemma.testing.reference import CACHE
from vllm_diffusion.records import CanvasBatch, CanvasStats, Emission, Noise
from vllm_diffusion.rules.entropy_bound import EntropyBound
from vllm_diffusion.step import advance

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.head.rows import Rows

LENGTH, VOCAB, SLOTS = 16, 61, 6

CONSTANTS = EntropyBoundConstants(
    max_steps=12,
    t_min=0.4,
    t_max=0.8,
    entropy_bound=0.1,
    confidence_threshold=0.05,
    stability_threshold=1,
)


NOTHING = Constraints()


@cache
def random_tables(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(VOCAB, VOCAB, generator=generator),
        torch.randn(128, VOCAB, generator=generator),
    )


@dataclass(frozen=True, slots=True)
class TableModel:
    """A denoiser that grows surer with every step, at a pace set by ``sharpness``."""

    seed: int = 0
    sharpness: float = 3.0

    def logits(self, tokens: Tensor, position: Tensor, step: int, soft: Tensor | None) -> Tensor:
        """[L] tokens at [L] positions -> [L, V]; ``soft`` [L, V] is the previous distribution."""
        by_token, by_position = random_tables(self.seed)
        logits = by_token[tokens] + self.sharpness * step * by_position[position]
        return logits if soft is None else logits + 2.0 * soft


@dataclass(frozen=True, slots=True)
class Trace:
    """What one canvas went through."""

    canvases: list[list[int]]  # input of every step, then the input after the last one
    argmax: list[list[int]]  # after every step
    steps: int


@contextmanager
def multinomial_drawn_by(noise: Noise) -> Iterator[None]:
    """Let the published loop draw its sample from our noise."""
    original = torch.multinomial

    def draw(weight: Tensor, num_samples: int) -> Tensor:
        assert num_samples == 1
        return sample_rows(weight, noise)[:, None]

    torch.multinomial = draw  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.multinomial = original


def published(
    model: TableModel, seed: int, start: int, length: int, rule: EntropyBoundConstants
) -> Trace:
    """One canvas through the published ``_denoising_step``, sampler, processor and criteria."""
    key = torch.tensor([split_seed(seed)])
    position = start + torch.arange(length)
    sampler = EntropyBoundSampler(
        EntropyBoundSamplerConfig(rule.entropy_bound), length, VOCAB, rule.max_steps
    )
    criteria = StableAndConfidentStoppingCriteria(
        rule.stability_threshold, rule.confidence_threshold
    )
    processor = LinearTemperatureScheduleLogitsProcessor(rule.t_min, rule.t_max, rule.max_steps)
    owner = SimpleNamespace(
        config=SimpleNamespace(text_config=SimpleNamespace(vocab_size=VOCAB)),
        model=SimpleNamespace(
            decoder=SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))
        ),
    )

    canvas = initial_canvas(key, position[None], VOCAB)
    argmax, belief = canvas, None
    finished = torch.zeros(1, dtype=torch.bool)
    trace = Trace([canvas[0].tolist()], [], 0)
    for step in range(rule.max_steps):

        def forward(
            decoder_input_ids: Tensor,
            self_conditioning_logits: Tensor | None,
            step: int = step,
            **_: object,
        ) -> SimpleNamespace:
            soft = (
                None if self_conditioning_logits is None else self_conditioning_logits.softmax(-1)
            )
            row = model.logits(
                decoder_input_ids[0], position, step, None if soft is None else soft[0]
            )
            return SimpleNamespace(logits=row[None])

        noise = Noise(
            seed=key.expand(length, 2), position=position, step=torch.full((length,), step)
        )
        renoise = uniform_tokens(key, position[None], torch.tensor([step]), VOCAB)
        sampler.initialize_canvas = lambda *_, renoise=renoise: renoise
        with multinomial_drawn_by(noise):
            canvas, argmax, belief, finished = DiffusionGemmaGenerationMixin._denoising_step(
                owner,
                decoder_forward=forward,
                current_canvas=canvas,
                argmax_canvas=argmax,
                input_ids=None,
                decoder_position_ids=position[None],
                self_conditioning_logits=belief,
                mask_mapping={},
                finished_denoising=finished,
                cur_step=rule.max_steps - step,
                sampler=sampler,
                logits_processor=processor,
                diffusion_stopping_criteria=criteria,
                **{CACHE: None},
            )
        trace.canvases.append(canvas[0].tolist())
        trace.argmax.append(argmax[0].tolist())
        if bool(finished):
            break
    return replace(trace, steps=len(trace.argmax))


class Engine:
    """The smallest loop around ``advance``: canvases at some starts, advanced until committed.

    Hidden rows are the logits themselves and the embedding is the identity, so that the
    self-conditioning the pool carries is the distribution the table model asks for.
    """

    def __init__(
        self,
        model: TableModel,
        rule: EntropyBoundConstants = CONSTANTS,
        *,
        remembered: int | None = None,
    ) -> None:
        self.model, self.rule = model, EntropyBound(UniformNoise(VOCAB))
        self.pool = CanvasPool(
            num_slots=SLOTS,
            canvas_length=LENGTH,
            hidden_size=VOCAB,
            vocab_size=VOCAB,
            constants=rule,
            remembered=remembered,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.head = ReferenceHead(
            logits=lambda hidden: hidden, soft_embedding=lambda prob: prob, max_rows=37
        )
        self.table = ConstraintTable(
            canvas_length=LENGTH, vocab_size=VOCAB, device=torch.device("cpu")
        )
        self.guards = Guards()
        self.automata = AutomatonSlots(num_slots=SLOTS, device=torch.device("cpu"))
        self.text = torch.zeros(SLOTS, 512, dtype=torch.int64)
        self.start: dict[int, int] = {}
        self.width: dict[int, int] = {}

    def admit(
        self,
        slot: int,
        seed: int,
        start: int,
        width: int = LENGTH,
        constraints: Constraints = NOTHING,
        *,
        guard: Guard | None = None,
        automaton: TokenAutomaton | None = None,
        budget: int = 1 << 20,
    ) -> None:
        self.guards.admit(slot, guard)
        self.automata.release(slot)
        if automaton is not None:
            name, behind = str(id(automaton)), start + budget
            self.automata.admit(slot, automaton, name=name, output=(), behind=behind)
        self.start[slot], self.width[slot] = start, width
        self.table.admit(slot, constraints, prompt_length=start)
        self.pool.admit(slot, seed=seed)
        self.pool.begin(torch.tensor([slot]), start + torch.arange(LENGTH)[None])

    def watch_head(self) -> list[Rows]:
        """The rows that the head is called with from now on."""
        seen: list[Rows] = []
        inner = self.head

        def head(rows: Rows) -> CanvasStats:
            seen.append(rows)
            return inner(rows)

        self.head = head  # type: ignore[assignment]
        return seen

    def step(self, *slots: int) -> Emission:
        """One ``advance`` over some slots; padding rows hold NaN, which must reach nothing."""
        hidden = torch.full((len(slots), LENGTH, VOCAB), torch.nan)
        for row, slot in enumerate(slots):
            width, taken = self.width[slot], int(self.pool.step[slot])
            if bool(self.pool.causal[slot]):
                continue
            hidden[row, :width] = self.model.logits(
                self.pool.tokens[slot, :width],
                self.start[slot] + torch.arange(width),
                taken,
                self.pool.soft_embedding[slot, :width] if taken else None,
            )
        width = torch.tensor([self.width[slot] for slot in slots])
        start = torch.tensor([self.start[slot] for slot in slots])
        batch = CanvasBatch(
            slots=torch.tensor(slots),
            width=width,
            position=start[:, None] + torch.arange(LENGTH),
            valid=torch.arange(LENGTH) < width[:, None],
        )
        rewrite = self.table.rewrite(
            slots,
            batch,
            text=self.text,
            argmax=self.pool.argmax,
            step=self.pool.step - self.pool.first_step,
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
        )
        self.automata.advance(slots, batch, emission)
        for row, slot in enumerate(slots):
            first, count = self.start[slot], int(emission.count[row])
            self.text[slot, first : first + count] = emission.tokens[row, :count]
            self.start[slot] += count
        return emission

    def run_canvas(self, slot: int, *others: int) -> tuple[Trace, Emission]:
        """Advance until the slot commits, recording it; ``others`` run along."""
        width = self.width[slot]
        trace = Trace([self.pool.tokens[slot, :width].tolist()], [], 0)
        while not bool(self.pool.causal[slot]):
            self.step(slot, *others)
            trace.canvases.append(self.pool.tokens[slot, :width].tolist())
            trace.argmax.append(self.pool.argmax[slot, :width].tolist())
        return replace(trace, steps=len(trace.argmax)), self.step(slot, *others)
