"""Random parameters in random company: promises hold, the seed decides, and nothing leaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from helpers.parity import ENGINE, SPEC
from helpers.probe import Probe
from helpers.promises import assert_promises
from helpers.random_requests import (
    WAYS,
    Shape,
    draw_prompt,
    draw_requests,
    draw_sampling,
    tokens_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS, VOCAB = SPEC.canvas, 512
SHAPE = Shape(canvas=CANVAS, vocab=VOCAB)
SHORT = Shape(canvas=CANVAS, vocab=VOCAB, max_steps=8)
"""Few steps a canvas, for many requests."""


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(dice=st.randoms(use_true_random=False), count=st.integers(1, 6))
def test_promises_hold_in_any_company(
    engine: Callable[..., LLM], parity_checkpoint: Path, dice: Random, count: int
) -> None:
    llm = engine(parity_checkpoint, **ENGINE)
    asked = [draw_sampling(dice, SHAPE, seed=number) for number in range(count)]
    prompts = [draw_prompt(dice, llm.get_tokenizer(), 120) for _ in asked]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
    )
    for sampling, output in zip(asked, outputs, strict=True):
        assert len(output.outputs) == sampling.n
        for answer in output.outputs:
            assert_promises(sampling, answer, llm)
    Inside(llm).assert_idle()


def test_a_seed_gives_the_same_answer_whoever_shares_the_batch(
    engine: Callable[..., LLM], parity_checkpoint: Path
) -> None:
    made = []
    for way in WAYS:
        llm = engine(parity_checkpoint, **ENGINE, **way.options)
        prompts, asked = draw_requests(llm.get_tokenizer(), SHORT, 150, longest=200)
        made.append(tokens_of(llm, way, prompts, asked))
    for sampling, alone, three, sixteen in zip(asked, *made, strict=True):
        assert alone == three == sixteen, sampling


def test_preemption_changes_no_answer_and_no_logprob(
    engine: Callable[..., LLM], parity_checkpoint: Path
) -> None:
    def answers(llm: LLM) -> list[tuple[list[int], Any]]:
        prompts, asked = draw_requests(llm.get_tokenizer(), SHORT, 24, longest=150)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
        )
        return [
            (list(answer.token_ids), [sorted(each) for each in answer.logprobs or ()])
            for output in outputs
            for answer in output.outputs
        ]

    expected = answers(engine(parity_checkpoint, **ENGINE))
    tight = engine(
        parity_checkpoint, **ENGINE | {"max_model_len": 224, "num_gpu_blocks_override": 40}
    )
    with Probe() as probe:
        preempted = answers(tight)
    assert probe.preemptions > 0, "the cache was large enough for all: nothing was preempted"
    assert preempted == expected
