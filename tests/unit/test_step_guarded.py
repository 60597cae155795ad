"""``advance`` where a parser guards canvases: what settles, what is committed, what is left."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from helpers.grammars import (
    ARITHMETIC,
    BRACKETS,
    END,
    JSON,
    JUDGES,
    OTHER_END,
    SILENT,
    TREE,
    VOCABULARY,
    compiled,
    compiler,
    may_be_begun,
    written,
)
from helpers.table_model import CONSTANTS, LENGTH, NOTHING, VOCAB, Engine, TableModel

from vllm_diffusion import step as step_module
from vllm_diffusion.constrain.constraints import Constraints
from vllm_diffusion.constrain.grammar import GrammarCompiler
from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision, Emission, StopReason
from vllm_diffusion.rules.entropy_bound import EntropyBound

if TYPE_CHECKING:
    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.constrain.guard import Guard

GRAMMARS = [JSON, ARITHMETIC, BRACKETS, TREE]
NAMES = ["json", "arithmetic", "brackets", "tree"]
START, BUDGET = 9, 30


def guard_of(grammar: tuple[str, str], budget: int | None = BUDGET, **options: object) -> Guard:
    options = {"end_tokens": [END]} | options
    return compiler().guard(compiled(grammar), tokens_left=budget, **options)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Run:
    """What a request became."""

    tokens: list[int]  # up to its budget and its end
    emissions: list[Emission]

    @property
    def counts(self) -> list[int]:
        return [int(each.count[0]) for each in self.emissions]


def run(
    grammar: tuple[str, str] | None,
    seed: int,
    *,
    sharpness: float = 0.7,
    max_steps: int = CONSTANTS.max_steps,
    fused: bool = False,
    budget: int = BUDGET,
    constraints: Constraints = NOTHING,
    ends: tuple[int, ...] = (END,),
    doubt: float = 0.0,
) -> Run:
    """A request alone, canvas by canvas, until its end token or its budget."""
    engine = Engine(TableModel(seed=seed, sharpness=sharpness))
    guard = None if grammar is None else guard_of(grammar, budget, end_tokens=ends)
    engine.admit(1, seed=seed, start=START, constraints=constraints, guard=guard)
    engine.pool.constants.max_steps[1] = max_steps
    engine.pool.fused[1] = fused
    engine.pool.constants.doubt_threshold[1] = doubt
    emissions, tokens = [], []
    while len(tokens) < budget and not set(ends) & set(tokens):
        emission = engine.step(1)
        if int(emission.count[0]):
            emissions.append(emission)
            tokens = engine.text[1, START : engine.start[1]].tolist()[:budget]
    last = next((at + 1 for at, token in enumerate(tokens) if token in ends), None)
    return Run(tokens[:last], emissions)


# ---- what is written ----


@for_each(max_steps=[1, 3])
@pytest.mark.parametrize("grammar", GRAMMARS, ids=NAMES)
def test_random_logits_write_valid_text(grammar: tuple[str, str], max_steps: int) -> None:
    # Towards the end of a text, or it would seldom come to one.
    closing = tuple((VOCABULARY.index(each), 1.0) for each in (b")", b"]", b"}", b"]]", b"))"))
    wishes = Constraints(bias=((END, 4.0), *closing))
    complete = 0
    for seed in range(5):
        how = {"max_steps": max_steps, "sharpness": (0.0, 0.7, 3.0)[seed % 3]}
        ours = run(grammar, seed, constraints=wishes, **how)  # type: ignore[arg-type]
        text, ended = written(ours.tokens)
        complete += ended
        assert JUDGES[grammar](text) if ended else may_be_begun(grammar, ours.tokens)
        assert ended or len(ours.tokens) == BUDGET
        fused = run(grammar, seed, constraints=wishes, fused=True, **how)  # type: ignore[arg-type]
        assert fused.tokens == ours.tokens
        assert fused.counts == ours.counts
    assert complete


def test_without_a_guard_they_do_not() -> None:
    # The same runs: a judge that passes everything would show here.
    for seed in range(4):
        assert not may_be_begun(JSON, run(None, seed, max_steps=1).tokens)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=NAMES)
def test_every_canvas_moves_on(grammar: tuple[str, str]) -> None:
    ours = run(grammar, 5, max_steps=2)
    assert min(ours.counts) >= 1
    assert any(1 < count < LENGTH for count in ours.counts), "some are committed in part"
    assert all(int(each.steps[0]) <= 2 for each in ours.emissions)


def test_another_token_may_end_the_text() -> None:
    for seed in range(2):
        ours = run(BRACKETS, seed, max_steps=2, ends=(OTHER_END,))
        assert END not in ours.tokens
        text, ended = written(ours.tokens, ends=(OTHER_END,))
        assert JUDGES[BRACKETS](text) if ended else len(ours.tokens) == BUDGET


def test_a_budget_cuts_a_text_and_frees_the_rows_behind_it() -> None:
    for budget in (1, 3, 17):
        ours = run(JSON, 8, budget=budget)
        assert may_be_begun(JSON, ours.tokens)
    # The model writes nothing but brackets: one is a beginning, two are not.
    brackets = Constraints(bias=((VOCABULARY.index(b"{"), 90.0),))
    for budget, counts in ((1, [LENGTH]), (2, [2])):
        ours = run(JSON, 8, budget=budget, constraints=brackets)
        assert ours.counts == counts
        assert ours.emissions[0].reason.tolist() == [StopReason.SETTLED]


def test_logits_that_are_no_numbers_end_no_canvas_short_of_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nothing = torch.full((LENGTH, VOCAB), torch.nan)
    monkeypatch.setattr(TableModel, "logits", lambda *_: nothing)
    ours = run(JSON, 1, max_steps=2, budget=12)
    assert may_be_begun(JSON, ours.tokens)
    assert min(ours.counts) >= 1


# ---- what a step does ----


class Watched:
    """The statistics that the rule is given and the decisions that follow, and the input rows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stats: list[CanvasStats] = []
        self.decisions: list[Decision] = []
        decide, advance = EntropyBound.decide, step_module.advance

        def watched(
            rule: EntropyBound, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats
        ) -> Decision:
            self.stats.append(stats)
            return decide(rule, pool, batch, stats)

        def observe(
            pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats, decision: Decision
        ) -> None:
            del pool, batch, stats
            self.decisions.append(decision)

        monkeypatch.setattr(EntropyBound, "decide", watched)
        monkeypatch.setattr(
            "helpers.table_model.advance",
            lambda *args, **named: advance(*args, **named, observe=observe),
        )


def legal_rows(tokens: list[int], grammar: tuple[str, str], behind: list[int]) -> int:
    return guard_of(grammar, None, written=behind).walk(tokens)


@pytest.mark.parametrize("grammar", GRAMMARS, ids=NAMES)
def test_the_first_illegal_row_becomes_its_best_legal_token(
    grammar: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(TableModel(seed=3, sharpness=0.7))
    watched = Watched(monkeypatch)
    engine.admit(0, seed=3, start=START, guard=guard_of(grammar))
    corrected = 0
    for _ in range(40):
        taken, committed = int(engine.pool.step[0]), engine.text[0, START : engine.start[0]]
        if not bool(engine.pool.causal[0]):
            logits = engine.model.logits(
                engine.pool.tokens[0],
                engine.start[0] + torch.arange(LENGTH),
                taken,
                engine.pool.soft_embedding[0] if taken else None,
            )
            plain = logits.argmax(dim=-1)
            row = legal_rows(plain.tolist(), grammar, committed.tolist())
            engine.step(0)
            ours, decision = watched.stats[-1].argmax[0], watched.decisions[-1]
            others = torch.arange(LENGTH) != row
            assert torch.equal(ours[others], plain[others])
            if row < LENGTH:
                corrected += 1
                legal = guard_of(grammar, None, written=committed.tolist())
                legal.walk(plain[:row].tolist())
                left = torch.full((VOCAB,), -torch.inf)
                left[legal.legal()] = 0.0
                assert int(ours[row]) == int((logits[row] + left).argmax())
                prob = ((logits[row] + left) / 0.8).softmax(-1)
                if taken == 0:
                    assert float(watched.stats[-1].top_prob[0, row]) == pytest.approx(
                        float(prob.max()), rel=1e-5
                    )
                assert bool(decision.accept[0, row])
                assert int(decision.next_tokens[0, row]) == int(ours[row])
        else:
            engine.step(0)
        if END in engine.text[0, START : engine.start[0]].tolist():
            break
    assert corrected > 3


def everything() -> GrammarCompiler:
    """Of a vocabulary in which only the end token writes nothing."""
    return GrammarCompiler(
        tuple(b"" if token == END else bytes([32 + token]) for token in range(VOCAB)), threads=1
    )


@for_each(sharpness=[0.0, 0.7, 3.0])
def test_a_canvas_that_is_legal_is_not_touched(sharpness: float) -> None:
    compiler = everything()
    grammar = compiler.compile("regex", "[ -~]*")
    for seed in range(3):
        engines = []
        for guard in (None, compiler.guard(grammar, end_tokens=[END])):
            engine = Engine(TableModel(seed=seed, sharpness=sharpness))
            engine.admit(2, seed=seed, start=START, guard=guard)
            engines.append(engine)
        plain, guarded = engines
        for _ in range(30):
            assert_equal_records(plain.step(2), guarded.step(2))
            assert_equal_slots(plain.pool, guarded.pool, 2)
        assert plain.start == guarded.start
        assert plain.start[2] > START


def assert_equal_records(one: Emission, other: Emission) -> None:
    for field in fields(Emission):
        first, second = getattr(one, field.name), getattr(other, field.name)
        assert (first is None and second is None) or torch.equal(first, second), field.name


def assert_equal_slots(one: CanvasPool, other: CanvasPool, slot: int) -> None:
    for name, value in vars(one).items():
        if isinstance(value, torch.Tensor) and value.dim():
            assert torch.equal(value[slot], getattr(other, name)[slot]), name


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_neighbours_do_not_notice_each_other(*, fused: bool) -> None:
    wishes = {
        0: (4, None, NOTHING),
        1: (5, JSON, NOTHING),
        2: (6, ARITHMETIC, Constraints(bias=((3, 2.0),), top_k=9)),
        3: (7, None, Constraints(allowed=(3, 4, 5, 6), temperature=0.0)),
        4: (8, BRACKETS, Constraints(temperature=0.0)),
    }

    def admitted(*slots: int) -> Engine:
        engine = Engine(TableModel(seed=1, sharpness=0.7))
        for slot in slots:
            seed, grammar, constraints = wishes[slot]
            guard = None if grammar is None else guard_of(grammar, None)
            engine.admit(slot, seed=seed, start=START, constraints=constraints, guard=guard)
            engine.pool.fused[slot] = fused
        return engine

    together = admitted(*wishes)
    for _ in range(40):
        together.step(*wishes)
    for slot in wishes:
        alone = admitted(slot)
        for _ in range(40):
            alone.step(slot)
        assert alone.start[slot] == together.start[slot] > START
        assert torch.equal(alone.text[slot], together.text[slot])
        assert_equal_slots(alone.pool, together.pool, slot)


def test_a_canvas_that_needs_a_correction_ends_once_that_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early = late = 0
    # The last rule would have every canvas end in its first step.
    for seed, (sharpness, doubt) in enumerate(((3.0, 0.0), (0.0, 0.0), (3.0, 1.0 + LENGTH))):
        watched = Watched(monkeypatch)
        ours = run(TREE, seed, sharpness=sharpness, doubt=doubt, fused=True)
        monkeypatch.undo()
        step = -1
        for emission in ours.emissions:
            step += int(emission.steps[0])
            settled = emission.reason.tolist() == [StopReason.SETTLED]
            if int(emission.count[0]) == LENGTH:
                continue
            if settled:
                early += 1
                last, now = (watched.stats[at].argmax for at in (step - 1, step))
                assert int(emission.steps[0]) > 1
                assert torch.equal(last, now)
                row = int(emission.count[0]) - 1
                assert bool(watched.decisions[step].accept[0, row])
            else:
                late += 1
                assert int(emission.steps[0]) == CONSTANTS.max_steps
    assert early > 3
    assert late > 3


def test_nothing_behind_a_correction_is_committed() -> None:
    # Every row says the same: the first is legal, the second is not and becomes a key.
    brackets = Constraints(bias=((VOCABULARY.index(b"{"), 90.0),))
    ours = run(JSON, 3, constraints=brackets)
    assert ours.counts[0] == 2
    assert int(ours.emissions[0].steps[0]) < CONSTANTS.max_steps
    assert ours.emissions[0].reason.tolist() == [StopReason.SETTLED]


def test_a_canvas_that_comes_back_goes_on_as_it_would_have() -> None:
    whole = run(JSON, 11, max_steps=2)
    for canvases in range(1, len(whole.counts)):
        kept = sum(whole.counts[:canvases])
        if END in whole.tokens[:kept]:
            break
        engine = Engine(TableModel(seed=11, sharpness=0.7))
        guard = guard_of(JSON, BUDGET - kept, written=whole.tokens[:kept])
        engine.admit(1, seed=11, start=START + kept, guard=guard)
        engine.pool.constants.max_steps[1] = 2
        _, emission = engine.run_canvas(1)
        assert_equal_records(emission, whole.emissions[canvases])


# ---- beside other wishes ----


@pytest.mark.parametrize(
    "constraints",
    [
        Constraints(temperature=0.0, min_p=0.05),
        Constraints(allowed=tuple(range(3, 30))),
        Constraints(allowed=(SILENT,)),
        Constraints(bias=((SILENT, 50.0), (VOCABULARY.index(b"}"), -9.0)), repetition=1.5),
        Constraints(bad_words=((3, 4), (4, 4), (18, 29), (7,), (5, 6)), early=((END, 30),)),
        Constraints(seed_canvas=(SILENT,) * 20, pinned=(0, 3, 9)),
        Constraints(top_k=1, early=((3, 60),)),
    ],
    ids=["greedy", "allowed", "nothing legal allowed", "biased", "bad words", "pins", "cut"],
)
@pytest.mark.parametrize("grammar", [JSON, BRACKETS], ids=["json", "brackets"])
def test_a_grammar_wins_over_every_other_wish(
    grammar: tuple[str, str], constraints: Constraints
) -> None:
    for seed in range(2):
        ours = run(grammar, seed, max_steps=3, constraints=constraints)
        text, ended = written(ours.tokens)
        assert JUDGES[grammar](text) if ended else may_be_begun(grammar, ours.tokens)


def test_where_the_grammar_leaves_a_choice_the_other_wishes_hold() -> None:
    only = tuple(VOCABULARY.index(each) for each in (b"(", b")"))
    forbidden = VOCABULARY.index(b"()(")
    plain, listed, worded = set(), set(), set()
    lists, words = Constraints(allowed=(END, *only)), Constraints(bad_words=((forbidden,),))
    for seed in range(3):
        plain |= set(run(BRACKETS, seed, max_steps=2).tokens)
        listed |= set(run(BRACKETS, seed, max_steps=2, constraints=lists).tokens)
        worded |= set(run(BRACKETS, seed, max_steps=2, constraints=words).tokens)
    assert plain > {forbidden, *only}
    assert listed <= {END, *only}
    assert forbidden not in worded


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_a_rule_that_commits_a_part_commits_what_is_legal_of_it(
    monkeypatch: pytest.MonkeyPatch, *, fused: bool
) -> None:
    decide = EntropyBound.decide

    def part(
        rule: EntropyBound, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats
    ) -> Decision:
        decision = decide(rule, pool, batch, stats)
        count = torch.full_like(batch.width, 5)
        return replace(decision, commit=replace(decision.commit, count=count))

    monkeypatch.setattr(EntropyBound, "decide", part)
    counts = set()
    for seed in range(3):
        ours = run(JSON, seed, max_steps=2, fused=fused)
        counts |= set(ours.counts)
        text, ended = written(ours.tokens)
        assert JUDGES[JSON](text) if ended else may_be_begun(JSON, ours.tokens)
    assert max(counts) == 5
    assert len(counts) > 2
