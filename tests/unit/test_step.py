"""``advance`` against the published loop body, canvas by canvas and token by token.

The model is a table: logits of a position follow from the token that stands there, the position,
the step and the self-conditioning of the step before. So a canvas that differs once differs in
everything after, and no forward is needed.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
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
from vllm_diffusion.constrain.table import ConstraintTable
from vllm_diffusion.denoise.renoise import initial_canvas, uniform_tokens
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.sample import sample_rows
from vllm_diffusion.records import (
    CanvasBatch,
    CanvasStats,
    Constraints,
    Emission,
    Noise,
    Rewrite,
    RuleConstants,
)
from vllm_diffusion.step import advance

if TYPE_CHECKING:
    from collections.abc import Iterator

LENGTH, VOCAB, SLOTS = 16, 61, 6

CONSTANTS = RuleConstants(
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


def published(model: TableModel, seed: int, start: int, length: int, rule: RuleConstants) -> Trace:
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
                past_key_values=None,
                finished_denoising=finished,
                cur_step=rule.max_steps - step,
                sampler=sampler,
                logits_processor=processor,
                diffusion_stopping_criteria=criteria,
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

    def __init__(self, model: TableModel, rule: RuleConstants = CONSTANTS) -> None:
        self.model, self.rule = model, rule
        self.pool = CanvasPool(
            num_slots=SLOTS,
            canvas_length=LENGTH,
            hidden_size=VOCAB,
            vocab_size=VOCAB,
            constants=rule,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.head = ReferenceHead(
            logits=lambda hidden: hidden, soft_embedding=lambda prob: prob, max_rows=37
        )
        self.table = ConstraintTable(
            canvas_length=LENGTH, vocab_size=VOCAB, device=torch.device("cpu")
        )
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
    ) -> None:
        self.start[slot], self.width[slot] = start, width
        self.table.admit(slot, constraints, prompt_length=start)
        self.pool.admit(slot, seed=seed)
        self.pool.begin(torch.tensor([slot]), start + torch.arange(LENGTH)[None])

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
            slots, batch, text=self.text, argmax=self.pool.argmax, step=self.pool.step
        )
        emission = advance(self.pool, batch, hidden, self.head, rewrite=rewrite)
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


def assert_same_canvas(ours: Trace, emission: Emission, theirs: Trace, width: int) -> None:
    assert ours.steps == theirs.steps
    # The input after the last step differs by design: ours is the finished canvas, to be committed.
    assert ours.canvases[:-1] == theirs.canvases[:-1]
    assert ours.argmax == theirs.argmax
    assert ours.canvases[-1] == theirs.argmax[-1]
    assert emission.tokens[0, :width].tolist() == theirs.argmax[-1]
    assert emission.count[0] == width
    assert emission.steps[0] == theirs.steps


@pytest.mark.parametrize("stability", [0, 1, 2, 3])
@pytest.mark.parametrize(("sharpness", "seeds"), [(0.0, 1), (1.0, 4), (3.0, 4)])
def test_three_canvases_equal_the_published_loop(
    stability: int, sharpness: float, seeds: int
) -> None:
    rule = replace(CONSTANTS, stability_threshold=stability)
    lengths = set()
    for seed in range(seeds):
        model = TableModel(seed=seed, sharpness=sharpness)
        engine = Engine(model, rule)
        engine.admit(2, seed=seed, start=5)
        for canvas in range(3):
            theirs = published(model, seed, 5 + canvas * LENGTH, LENGTH, rule)
            ours, emission = engine.run_canvas(2)
            assert_same_canvas(ours, emission, theirs, LENGTH)
            lengths.add(theirs.steps)
    if sharpness == 0.0:
        assert lengths == {CONSTANTS.max_steps}, "a model that stays unsure runs out of steps"
    else:
        assert len(lengths) > 1, "every canvas stopped at the same step: the stop was not tested"


@pytest.mark.parametrize("bound", [1e-4, 0.5, 20.0])
def test_other_entropy_bounds_equal_the_published_loop(bound: float) -> None:
    rule = replace(CONSTANTS, entropy_bound=bound)
    for seed in range(5):
        model = TableModel(seed=seed, sharpness=0.5)
        engine = Engine(model, rule)
        engine.admit(0, seed=seed, start=0)
        ours, emission = engine.run_canvas(0)
        assert_same_canvas(ours, emission, published(model, seed, 0, LENGTH, rule), LENGTH)


@pytest.mark.parametrize("width", [1, 2, 7, LENGTH - 1])
def test_a_narrow_canvas_equals_the_published_loop_at_that_length(width: int) -> None:
    for seed in range(5):
        model = TableModel(seed=seed, sharpness=0.8)
        engine = Engine(model)
        engine.admit(1, seed=seed, start=40, width=width)
        ours, emission = engine.run_canvas(1)
        assert_same_canvas(ours, emission, published(model, seed, 40, width, CONSTANTS), width)


def test_a_canvas_runs_the_same_alone_and_among_others() -> None:
    model = TableModel(sharpness=0.7)

    def crowd() -> Engine:
        engine = Engine(model)
        for slot in range(SLOTS):
            engine.admit(slot, seed=100 + slot, start=7 * slot, width=LENGTH - slot)
        return engine

    for slot in range(0, SLOTS, 2):
        alone = crowd()
        mixed = crowd()
        others = [other for other in range(SLOTS) if other != slot]
        # Uneven company: some are steps ahead, so denoise, finish and commit share a batch.
        for other in others:
            mixed.step(*others[: 1 + other % 3])
        for _ in range(2):
            ours, emission = alone.run_canvas(slot)
            again, emission_again = mixed.run_canvas(slot, *others)
            assert ours == again
            width = LENGTH - slot
            assert torch.equal(emission.tokens[0, :width], emission_again.tokens[0, :width])


def test_order_in_the_batch_does_not_matter() -> None:
    traces = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        engine = Engine(TableModel(sharpness=0.7))
        for slot in range(4):
            engine.admit(slot, seed=slot, start=slot)
        for _ in range(10):
            engine.step(*order)
        traces.append(engine.pool.tokens[:4].tolist())
    assert traces[0] == traces[1]


def test_a_preempted_canvas_starts_again_and_ends_the_same() -> None:
    engine = Engine(TableModel(sharpness=0.7))
    engine.admit(0, seed=3, start=20)
    for _ in range(3):
        engine.step(0)
    # Preemption loses the slot; the request comes back elsewhere with its text as its prompt.
    engine.admit(4, seed=3, start=20)
    undisturbed = Engine(TableModel(sharpness=0.7))
    undisturbed.admit(0, seed=3, start=20)
    ours, emission = engine.run_canvas(4)
    expected, expected_emission = undisturbed.run_canvas(0)
    assert ours == expected
    assert torch.equal(emission.tokens, expected_emission.tokens)


def test_the_step_limit_of_a_request_ends_its_canvas() -> None:
    engine = Engine(TableModel(sharpness=0.0))
    engine.admit(0, seed=1, start=0)
    engine.admit(1, seed=1, start=0)
    engine.pool.max_steps[1] = 4
    ours, emission = engine.run_canvas(1)
    assert ours.steps == 4
    assert int(emission.steps[0]) == 4
    longer, _ = engine.run_canvas(0)
    assert longer.steps == CONSTANTS.max_steps


def test_the_temperature_reaches_the_head() -> None:
    seen = []
    engine = Engine(TableModel())
    inner = engine.head

    def head(
        hidden: Tensor, temperature: Tensor, noise: Noise, rewrite: Rewrite | None
    ) -> CanvasStats:
        assert rewrite is None
        seen.append((temperature.tolist(), noise))
        return inner(hidden, temperature, noise)

    engine.head = head  # type: ignore[assignment]
    engine.admit(0, seed=(9 << 32) + 4, start=30)
    engine.admit(1, seed=8, start=50)
    engine.step(1)
    engine.step(0, 1)
    temperature, noise = seen[1]
    first, second = 0.8, 0.4 + 0.4 * 11 / 12
    assert temperature == pytest.approx([first] * LENGTH + [second] * LENGTH)
    assert noise.seed.tolist() == [[4, 9]] * LENGTH + [[8, 0]] * LENGTH
    assert noise.position.tolist() == [*range(30, 30 + LENGTH), *range(50, 50 + LENGTH)]
    assert noise.step.tolist() == [0] * LENGTH + [1] * LENGTH


def committed(
    constraints: Constraints, seed: int, canvases: int = 2, sharpness: float = 0.7
) -> list[int]:
    """The output of a request, alone."""
    engine = Engine(TableModel(seed=seed, sharpness=sharpness))
    engine.admit(1, seed=seed, start=9, constraints=constraints)
    for _ in range(canvases):
        engine.run_canvas(1)
    return engine.text[1, 9 : engine.start[1]].tolist()


def pairs(tokens: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(tokens))


@pytest.mark.parametrize("sharpness", [0.0, 0.7])
def test_no_bad_word_is_committed(sharpness: float) -> None:
    for seed in range(6):
        plain = committed(NOTHING, seed, sharpness=sharpness)
        # Every pair of what would be said is bad.
        words = tuple(pairs(plain))
        rewritten = committed(Constraints(bad_words=words), seed, sharpness=sharpness)
        assert not set(pairs(rewritten)) & set(words)
        assert len(rewritten) == len(plain)


def test_a_bad_word_may_not_lie_across_two_canvases_either() -> None:
    for seed in range(4):
        plain = committed(NOTHING, seed)
        word = (plain[LENGTH - 1], plain[LENGTH])
        rewritten = committed(Constraints(bad_words=(word,)), seed)
        assert word not in pairs(rewritten)
        assert rewritten[:LENGTH] == plain[:LENGTH]


def test_a_canvas_of_one_step_is_repaired() -> None:
    # No step before it: nothing but the repair can have kept the words out.
    engine = Engine(TableModel(sharpness=0.0))
    for slot in (0, 1):
        words = tuple(pairs(engine.text[0, 9:25].tolist())) if slot else ()
        engine.admit(slot, seed=4, start=9, constraints=Constraints(bad_words=words))
        engine.pool.max_steps[slot] = 1
        engine.run_canvas(slot)
    plain, rewritten = engine.text[0, 9:25].tolist(), engine.text[1, 9:25].tolist()
    assert not set(pairs(plain)) & set(pairs(rewritten))
    # One of two neighbours had to change, no more.
    changed = [a != b for a, b in zip(plain, rewritten, strict=True)]
    assert not any(both == (True, True) for both in itertools.pairwise(changed))


def test_a_settled_canvas_with_a_bad_word_goes_on() -> None:
    model = TableModel(sharpness=3.0)
    engine = Engine(model)
    engine.admit(0, seed=1, start=5)
    plain, _ = engine.run_canvas(0)
    word = tuple(plain.argmax[-1][3:5])
    again = Engine(model)
    again.admit(0, seed=1, start=5, constraints=Constraints(bad_words=(word,)))
    ours, emission = again.run_canvas(0)
    assert word not in pairs(emission.tokens[0].tolist())
    assert plain.steps < CONSTANTS.max_steps
    assert ours.argmax[-1] == ours.argmax[-2], "it settled, rather than ran out of steps"


def test_the_head_sees_no_commit_row_and_none_beyond_a_canvas() -> None:
    loop, seen = Engine(TableModel()), []

    class Watched:
        def __call__(self, hidden: Tensor, *args: object) -> CanvasStats:
            seen.append(len(hidden))
            return inner(hidden, *args)  # type: ignore[arg-type]

    inner, loop.head = loop.head, Watched()  # type: ignore[assignment]
    for slot in range(3):
        loop.admit(slot, seed=slot, start=20, width=LENGTH - slot)
    loop.step(0, 1, 2)
    loop.pool.causal[1] = True
    loop.step(0, 1, 2)
    loop.pool.causal[:] = True
    loop.step(0, 1, 2)  # nothing to compute, so no head
    assert seen == [3 * LENGTH - 3, 2 * LENGTH - 2]


def test_greedy_input_holds_the_argmax_where_accepted() -> None:
    model = TableModel(sharpness=0.7)
    engine, sampled = Engine(model), Engine(model)
    engine.admit(0, seed=3, start=20, constraints=Constraints(temperature=0.0))
    sampled.admit(0, seed=3, start=20)
    ours, _ = engine.run_canvas(0)
    theirs, _ = sampled.run_canvas(0)
    noise = [
        uniform_tokens(
            torch.tensor([split_seed(3)]),
            20 + torch.arange(LENGTH)[None],
            torch.tensor([step]),
            VOCAB,
        )[0].tolist()
        for step in range(ours.steps)
    ]
    for trace, greedy in ((ours, True), (theirs, False)):
        # The input after a step is the step's argmax or the step's noise, and nothing else.
        foreign = [
            (step, at)
            for step in range(min(trace.steps, len(noise)) - 1)
            for at in range(LENGTH)
            if trace.canvases[step + 1][at] not in (trace.argmax[step][at], noise[step][at])
        ]
        assert (not foreign) == greedy
    assert ours.argmax[0] == theirs.argmax[0], "the first argmax depends on no sample"


def test_the_temperature_of_a_request_scales_the_schedule() -> None:
    seen = []
    engine = Engine(TableModel())
    inner = engine.head

    def head(
        hidden: Tensor, temperature: Tensor, noise: Noise, rewrite: Rewrite | None
    ) -> CanvasStats:
        seen.append(temperature.view(-1, LENGTH)[:, 0].tolist())
        return inner(hidden, temperature, noise, rewrite)

    engine.head = head  # type: ignore[assignment]
    for slot, temperature in enumerate((1.0, 0.5, 0.0)):
        engine.admit(slot, seed=1, start=5, constraints=Constraints(temperature=temperature))
    engine.step(0, 1, 2)
    engine.step(0, 1, 2)
    second = 0.4 + 0.4 * 11 / 12
    assert seen[0] == pytest.approx([0.8, 0.4, 0.8])
    assert seen[1] == pytest.approx([second, second / 2, second])


def test_pins_are_in_the_output_and_not_in_the_next_canvas() -> None:
    for seed in range(3):
        plain = committed(NOTHING, seed)
        given = tuple((token + 30) % VOCAB for token in plain[:LENGTH])
        pins = (0, 3, LENGTH - 1)
        pinned = committed(Constraints(seed_canvas=given, pinned=pins), seed)
        assert [pinned[at] for at in pins] == [given[at] for at in pins]
        assert [pinned[LENGTH + at] for at in pins] != [given[at] for at in pins]
        free = [at for at in range(LENGTH) if at not in pins]
        assert [pinned[at] for at in free] != [given[at] for at in free]


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(temperature=0.4, top_k=9, min_p=0.01, top_p=0.95),
        Constraints(bias=((3, 4.0), (4, -9.0)), repetition=1.3, frequency=0.3, presence=0.4),
        Constraints(allowed=tuple(range(20)), early=((5, 9),), bad_words=((3, 4), (7,))),
        Constraints(temperature=0.0, seed_canvas=(9,) * LENGTH, pinned=(2, 7)),
    ],
    ids=["truncated", "penalised", "masked", "greedy and pinned"],
)
def test_a_rewritten_canvas_runs_the_same_alone_and_among_others(constraints: Constraints) -> None:
    model = TableModel(sharpness=0.7)
    alone, mixed = Engine(model), Engine(model)
    alone.admit(0, seed=8, start=11, constraints=constraints)
    mixed.admit(0, seed=8, start=11, constraints=constraints)
    mixed.admit(1, seed=9, start=3, constraints=Constraints(top_k=3, allowed=(1, 2, 3)))
    mixed.admit(2, seed=9, start=3)
    mixed.admit(
        3, seed=9, start=3, constraints=Constraints(bad_words=((1, 2, 3, 4),), presence=1.0)
    )
    untouched = Engine(model)
    untouched.admit(2, seed=9, start=3)
    mixed.step(1, 2, 3)
    for _ in range(2):
        ours, emission = alone.run_canvas(0)
        again, emission_again = mixed.run_canvas(0, 3, 2, 1)
        assert ours == again
        assert torch.equal(emission.tokens[0], emission_again.tokens[0])
    while untouched.start[2] < mixed.start[2]:
        untouched.step(2)
    assert torch.equal(untouched.text[2], mixed.text[2])
    assert mixed.start[2] > 3
