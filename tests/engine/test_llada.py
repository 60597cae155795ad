"""LLaDA on the engine, held to the dense loop of its definition: all text in every step.

``models/llada/testing/reference.py`` recomputes prompt and answer in every step, every row seeing
every row; here the same tokens leave block by block, in batches and under preemption.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from helpers.regimes import Asked, ask, assert_log_probs, by_draw, prompt_of, tokens_of

from vllm_diffusion.engine import carriers
from vllm_diffusion.models.llada.testing import checkpoint as maker
from vllm_diffusion.models.llada.testing.reference import answer
from vllm_diffusion.testing.dense_reveal import leftmost

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM

    from vllm_diffusion.testing.dense_reveal import Answer

pytestmark = pytest.mark.vllm

KINDS = ["llada", "illada", "moe"]
BLOCK = 8
LIMIT = 256
SEED = 2**40 + 7
ORDERS = {"leftmost": leftmost, "random": by_draw(SEED)}


def spec_of(kind: str) -> maker.TinySpec:
    return maker.TinySpec(kind=kind, kv_heads=2 if kind == "illada" else 4)


def requests(block: int = BLOCK) -> list[Asked]:
    """Answers of one canvas, of several, and such that the last is cut."""
    lengths = [1, 7, 8, 9, 16, 19, 33, 131]
    answers = [19, 60, 5, 33, 16, 7, 2 * block + 1, 26]
    first = len(maker.SPECIAL_TOKENS)
    return [
        Asked(prompt_of(length, seed, vocab=maker.TinySpec().vocab, special=first), most)
        for seed, (length, most) in enumerate(zip(lengths, answers, strict=True))
    ]


@cache
def model_of(kind: str) -> Any:
    return maker.build_model(spec_of(kind))


@cache
def expected(kind: str, block: int = BLOCK, **asked: Any) -> list[Answer]:
    return [
        answer(
            model_of(kind),
            each.prompt,
            each.length,
            mask_id=maker.MASK_ID,
            block=block,
            **{"max_steps": block, **asked},
        )
        for each in requests(block)
    ]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: maker.make_tiny_checkpoint(tmp_path_factory.mktemp(kind), spec_of(kind))
        for kind in KINDS
    }


@pytest.fixture
def start(engine_pool: EnginePool, checkpoints: dict[str, Path]) -> Callable[..., LLM]:
    def started(kind: str = "llada", block: int = BLOCK, **options: Any) -> LLM:
        defaults = {
            "diffusion_config": {"canvas_length": block},
            "max_model_len": LIMIT,
            "max_num_batched_tokens": 2 * LIMIT,
        }
        return engine_pool.get(checkpoints[kind], **(defaults | options))

    return started


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_log_probabilities_are_those_of_the_dense_loop(
    start: Callable[..., LLM], kind: str
) -> None:
    llm = start(kind)
    for options in ({}, {"diffusion_reveal_threshold": 0.4}, {"diffusion_max_steps": 3}):
        asked = {name.removeprefix("diffusion_"): value for name, value in options.items()}
        if "reveal_threshold" in asked:
            asked = {"threshold": asked["reveal_threshold"]}
        wanted = expected(kind, **asked)
        outputs = ask(llm, requests(), logprobs=1, extra_args=options)
        assert tokens_of(outputs) == [each.tokens for each in wanted]
        assert_log_probs(outputs, wanted)
    Inside(llm).assert_idle()
    alone = [tokens_of(ask(llm, [each]))[0] for each in requests()[:3]]
    assert alone == [each.tokens for each in expected(kind)[:3]]


def test_any_order_is_that_of_the_dense_loop(start: Callable[..., LLM]) -> None:
    llm = start()
    for order, surer in ORDERS.items():
        for steps in (BLOCK, 3):
            extra = {"diffusion_reveal_by": order, "diffusion_max_steps": steps}
            outputs = ask(llm, requests(), seed=SEED, logprobs=1, extra_args=extra)
            wanted = expected("llada", surer=surer, max_steps=steps)
            assert tokens_of(outputs) == [each.tokens for each in wanted], extra
            assert_log_probs(outputs, wanted)
    other = ask(llm, requests(), seed=SEED + 1, extra_args=extra)
    assert tokens_of(other) != [each.tokens for each in wanted]


def test_an_end_that_only_the_family_names_ends_an_answer(start: Callable[..., LLM]) -> None:
    llm, asked = start(), requests()[1]
    said = expected("llada")[1].tokens
    place = next(at for at in range(12, len(said)) if said[at] not in said[:at])
    config = llm.llm_engine.model_config.hf_config
    served = carriers.served(config)
    family = replace(served.family, unlisted_ends=(said[place],))
    carriers.put_served(config, replace(served, family=family))
    try:
        (ended,) = ask(llm, [asked], ignore_eos=False)
        (ignored,) = ask(llm, [asked])
    finally:
        carriers.put_served(config, served)
    assert tokens_of([ended, ignored]) == [said[: place + 1], said]
    assert ended.outputs[0].finish_reason == "stop"


def test_the_published_block(start: Callable[..., LLM]) -> None:
    wanted = expected("llada", block=32)
    assert tokens_of(ask(start(block=32), requests(32))) == [each.tokens for each in wanted]
    narrow = ask(start(block=32), requests(), extra_args={"diffusion_canvas_length": BLOCK})
    assert tokens_of(narrow) == [each.tokens for each in expected("llada")]


@pytest.mark.parametrize("wrong", [{"causal": True}, {"horizon": False}, {"threshold": 0.4}])
def test_the_comparison_notices(wrong: dict[str, Any]) -> None:
    right, others = (
        [token for each in answers for token in each.tokens]
        for answers in (expected("llada"), expected("llada", **wrong))
    )
    assert sum(a != b for a, b in zip(right, others, strict=True)) > 10


def test_few_pages_and_small_steps_change_nothing(
    start: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = start(max_num_batched_tokens=LIMIT, num_gpu_blocks_override=14, block_size=32)
    scheduler, preempted = Inside(llm).scheduler, []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(
        scheduler,
        "_preempt_request",
        lambda *args, **options: (preempted.append(args), preempt(*args, **options)),
    )
    outputs = ask(llm, requests())
    assert preempted
    assert tokens_of(outputs) == [each.tokens for each in expected("llada")]
    Inside(llm).assert_idle()


def test_an_approximate_prefix_is_that_of_its_own_loop(start: Callable[..., LLM]) -> None:
    llm = start()
    outputs = ask(llm, requests(), extra_args={"diffusion_approximate_prefix": True})
    wanted = expected("llada", kept_prefix=True)
    assert tokens_of(outputs) == [each.tokens for each in wanted]
    exact = [token for each in expected("llada") for token in each.tokens]
    found = [token for tokens in tokens_of(outputs) for token in tokens]
    changed = sum(a != b for a, b in zip(exact, found, strict=True))
    assert changed, "nothing was approximated"
