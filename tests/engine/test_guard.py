"""Requests that a grammar guards, in an engine: every text is one of the grammar's or begins one.

The guards are put into their slots by hand, as requests come to the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import xgrammar
from helpers.grammars import ARITHMETIC, BRACKETS, JSON, JUDGES, TREE
from helpers.inside import Inside
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_diffusion.constrain.grammar import GrammarCompiler
from vllm_diffusion.engine.model_state import CanvasModelState
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import EOS, SPECIAL_TOKENS, token_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vllm import LLM, CompletionOutput
    from vllm.v1.core.sched.output import NewRequestData

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PROMPT = [300, 17, 44, 300, 90, 21]
GRAMMARS = (JSON, ARITHMETIC, BRACKETS, TREE)
END = token_id(EOS)
BUDGET = 50


class Admission:
    """Gives a guard to the requests with a seed that is listed, whenever they get a slot."""

    def __init__(self, llm: LLM) -> None:
        tokenizer = llm.get_tokenizer()
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer)
        vocabulary = [bytes(piece) for piece in info.decoded_vocab]
        vocabulary[: len(SPECIAL_TOKENS)] = [b""] * len(SPECIAL_TOKENS)
        self.vocabulary = vocabulary
        self.compiler = GrammarCompiler(vocabulary, threads=1)
        self.grammar_of: dict[int, tuple[str, str]] = {}
        self.admitted = 0

    def patched(self) -> Any:
        inner = CanvasModelState.add_request

        def add_request(state: CanvasModelState, slot: int, new: NewRequestData) -> None:
            inner(state, slot, new)
            sampling = new.sampling_params
            assert sampling is not None
            assert sampling.max_tokens is not None
            if (grammar := self.grammar_of.get(sampling.seed or 0)) is None:
                return
            written = (new.prefill_token_ids or [])[len(new.prompt_token_ids or ()) :]
            self.admitted += 1
            guard = self.compiler.guard(
                self.compiler.compile(*grammar),
                end_tokens=[END],
                tokens_left=sampling.max_tokens - len(written),
                written=written,
            )
            state.guards.admit(slot, guard)

        return patch.object(CanvasModelState, "add_request", add_request)

    def assert_obeys(self, grammar: tuple[str, str], answer: CompletionOutput) -> bool:
        """Whether the answer is complete; it is a text of the grammar, or the beginning of one."""
        guard = self.compiler.guard(self.compiler.compile(*grammar), end_tokens=[END])
        assert guard.walk(answer.token_ids) == len(answer.token_ids)
        if answer.finish_reason == "length":
            assert END not in answer.token_ids
            return False
        assert answer.token_ids[-1] == END
        assert JUDGES[grammar](answer.text)
        return True


@pytest.fixture
def llm(engine: Callable[..., LLM]) -> LLM:
    return engine()


@pytest.fixture
def admission(llm: LLM) -> Iterator[Admission]:
    ours = Admission(llm)
    with ours.patched():
        yield ours


def sampling(admission: Admission, seed: int, *, fused: bool, **options: Any) -> SamplingParams:
    """Canvases of few steps, and a liking for what ends a text."""
    steps = options.pop("max_steps", 1 + seed % 3)
    closing = {token: 1.5 for token, piece in enumerate(admission.vocabulary) if piece in b')]}"'}
    defaults = {"max_tokens": BUDGET, "logit_bias": closing | {END: 5.0}}
    extra = {"diffusion_max_steps": steps, "diffusion_fused_commit": fused}
    return SamplingParams(seed=seed, extra_args=extra, **(defaults | options))


def prompt(wish: SamplingParams) -> dict[str, list[int]]:
    return {"prompt_token_ids": [30 + (wish.seed or 0) % 200, *PROMPT]}


def ask(llm: LLM, wishes: list[SamplingParams]) -> list[CompletionOutput]:
    prompts = [prompt(wish) for wish in wishes]
    return [output.outputs[0] for output in llm.generate(prompts, wishes, use_tqdm=False)]


def test_every_text_is_one_of_its_grammar_or_begins_one(llm: LLM, admission: Admission) -> None:
    seeds = range(1, 101)
    # Every fifth one goes free, beside the others.
    grammars = {seed: GRAMMARS[seed % 4] for seed in seeds if seed % 5}
    admission.grammar_of = grammars
    answers = {}
    for fused in (True, False):
        answers[fused] = ask(llm, [sampling(admission, seed, fused=fused) for seed in seeds])
    complete = dict.fromkeys(GRAMMARS, 0)
    for seed, answer, separate in zip(seeds, *answers.values(), strict=True):
        assert answer.token_ids == separate.token_ids
        assert (answer.text, answer.finish_reason) == (separate.text, separate.finish_reason)
        if seed in grammars:
            complete[grammars[seed]] += admission.assert_obeys(grammars[seed], answer)
    assert min(complete.values()) > 1, complete
    admission.grammar_of = {}
    free = ask(llm, [sampling(admission, seed, fused=True) for seed in seeds if not seed % 5])
    assert [each.token_ids for each in free] == [each.token_ids for each in answers[True][4::5]]


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_a_canvas_in_part_is_told_right(llm: LLM, admission: Admission, *, fused: bool) -> None:
    admission.grammar_of = {7: TREE}
    wish = sampling(admission, 7, fused=fused, logprobs=2)
    wish.extra_args["diffusion_telemetry"] = True  # type: ignore[index]
    (answer,) = ask(llm, [wish])
    admission.assert_obeys(TREE, answer)
    counts = [each.tokens for each in answer.diffusion.canvases]  # type: ignore[attr-defined]
    assert any(1 < count < 32 for count in counts)
    assert answer.logprobs is not None
    assert [next(iter(each)) for each in answer.logprobs] == list(answer.token_ids)


@pytest.mark.parametrize("moment", [2, 7])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_a_preempted_request_goes_on_where_it_was(
    llm: LLM, admission: Admission, moment: int, *, fused: bool
) -> None:
    admission.grammar_of = {2: TREE, 5: JSON}
    wishes = [sampling(admission, seed, fused=fused) for seed in (2, 5, 6)]
    expected = [list(each.token_ids) for each in ask(llm, wishes)]
    given: list[list[int]] = [[], [], []]
    for name, wish in enumerate(wishes):
        wish.output_kind = RequestOutputKind.DELTA
        llm.llm_engine.add_request(str(name), prompt(wish), wish)
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        if step == moment:
            Inside(llm).scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            given[int(output.request_id)] += output.outputs[0].token_ids
        step += 1
        assert step < 500
    assert given == expected
    assert admission.admitted == 2 + 2 + 2
    Inside(llm).assert_idle()


def test_an_aborted_request_leaves_no_guard(llm: LLM, admission: Admission) -> None:
    admission.grammar_of = {1: JSON}
    wish = sampling(admission, 1, fused=True, max_steps=20)
    llm.llm_engine.add_request("0", prompt(wish), wish)
    for _ in range(3):
        llm.llm_engine.step()
    inside = Inside(llm)
    slot = inside.slot_of("0")
    assert inside.model_state.guards.of([slot])
    llm.llm_engine.abort_request(["0"])
    (answer,) = ask(llm, [sampling(admission, 10, fused=True)])
    assert not inside.model_state.guards.of(range(8))
    inside.assert_idle()
    admission.grammar_of = {}
    assert ask(llm, [sampling(admission, 10, fused=True)])[0].token_ids == answer.token_ids


def test_scheduled_ahead_of_its_results(engine: Callable[..., LLM]) -> None:
    llm = engine(async_scheduling=True)
    ours = Admission(llm)
    ours.grammar_of = {seed: GRAMMARS[seed % 4] for seed in range(1, 13)}
    with ours.patched():
        answers = ask(llm, [sampling(ours, seed, fused=False) for seed in ours.grammar_of])
    for seed, answer in zip(ours.grammar_of, answers, strict=True):
        ours.assert_obeys(ours.grammar_of[seed], answer)
