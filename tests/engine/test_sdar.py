"""SDAR on the engine, held to the dense loop of its definition: text and canvases on a grid.

``models/sdar/testing/reference.py`` recomputes everything in every step under one mask; here the
same tokens must come out of pages, chunks, fused commits and batches.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from helpers.regimes import Asked, ask, assert_log_probs, by_draw, prompt_of, tokens_of

from vllm_diffusion.models.sdar.testing import checkpoint as maker
from vllm_diffusion.models.sdar.testing.reference import answer
from vllm_diffusion.testing.dense_reveal import leftmost

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM

    from vllm_diffusion.testing.dense_reveal import Answer

pytestmark = pytest.mark.vllm

PAGE = 32
SPEC = maker.TinySpec()
EXPERTS = maker.TinySpec(experts=4)
BLOCKS = [4, 8, 32]
SEED = 2**40 + 7
ORDERS = {"leftmost": leftmost, "random": by_draw(SEED)}


def requests(block: int) -> list[Asked]:
    """Prompts that end at, before and behind blocks and pages; answers that are no whole blocks."""
    lengths = [1, block - 1, block, block + 1, 2 * block, 2 * block + 3, PAGE, PAGE + 1, 131]
    answers = [19, 60, 5, 33, 2 * block, 7, 40, 21, 26]
    return [
        Asked(prompt_of(length, seed, vocab=SPEC.vocab, special=len(maker.SPECIAL_TOKENS)), most)
        for seed, (length, most) in enumerate(zip(lengths, answers, strict=True))
    ]


@cache
def model_of(spec: maker.TinySpec) -> Any:
    return maker.build_model(spec)


@cache
def expected(block: int, spec: maker.TinySpec = SPEC, **asked: Any) -> list[Answer]:
    return [
        answer(
            model_of(spec), each.prompt, each.length, mask_id=maker.MASK_ID, block=block, **asked
        )
        for each in requests(block)
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return maker.make_tiny_checkpoint(tmp_path_factory.mktemp("sdar"), SPEC)


@pytest.fixture
def start(engine_pool: EnginePool, checkpoint: Path) -> Callable[..., LLM]:
    def started(block: int, **options: Any) -> LLM:
        return engine_pool.get(
            checkpoint, hf_overrides={"block_size": block}, block_size=PAGE, **options
        )

    return started


@pytest.mark.parametrize("block", BLOCKS)
def test_tokens_and_log_probabilities_are_those_of_the_dense_loop(start: Any, block: int) -> None:
    llm = start(block)
    wanted = expected(block)
    for fused in (True, False):
        outputs = ask(
            llm, requests(block), logprobs=1, extra_args={"diffusion_fused_commit": fused}
        )
        assert tokens_of(outputs) == [each.tokens for each in wanted]
        assert_log_probs(outputs, wanted)
    Inside(llm).assert_idle()
    alone = [tokens_of(ask(llm, [each]))[0] for each in requests(block)[:3]]
    assert alone == [each.tokens for each in wanted[:3]]


@pytest.mark.parametrize(
    "wrong",
    [{"causal_prompt": True}, {"grid_at_prompt_end": True}, {"threshold": 1.0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_the_comparison_notices(wrong: dict[str, Any]) -> None:
    right, others = expected(8), expected(8, **wrong)
    different = sum(
        a != b
        for one, other in zip(right, others, strict=True)
        for a, b in zip(one.tokens, other.tokens, strict=True)
    )
    assert different > 10


def test_any_order_is_that_of_the_dense_loop(start: Any) -> None:
    llm = start(8)
    for order, surer in ORDERS.items():
        for steps in (8, 3):
            extra = {
                "diffusion_reveal_by": order,
                "diffusion_reveal_threshold": 0.0,
                "diffusion_max_steps": steps,
            }
            outputs = ask(llm, requests(8), seed=SEED, logprobs=1, extra_args=extra)
            wanted = expected(8, surer=surer, threshold=0.0, max_steps=steps)
            assert tokens_of(outputs) == [each.tokens for each in wanted], extra
            assert_log_probs(outputs, wanted)
    other = ask(llm, requests(8), seed=SEED + 1, extra_args=extra)
    assert tokens_of(other) != [each.tokens for each in wanted]


@pytest.mark.parametrize(("block", "rows"), [(8, 24), (8, 40), (4, 11)])
def test_small_steps_make_canvases_wait_and_change_nothing(
    start: Any, block: int, rows: int
) -> None:
    llm = start(block, max_num_batched_tokens=rows)
    for fused in (True, False):
        outputs = ask(llm, requests(block), extra_args={"diffusion_fused_commit": fused})
        assert tokens_of(outputs) == [each.tokens for each in expected(block)]
    Inside(llm).assert_idle()


def test_preempted_requests_say_the_same(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = start(8, num_gpu_blocks_override=10, max_model_len=256)
    scheduler, preempted = Inside(llm).scheduler, []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(
        scheduler,
        "_preempt_request",
        lambda *args, **options: (preempted.append(args), preempt(*args, **options)),
    )
    outputs = ask(llm, requests(8))
    assert preempted
    assert tokens_of(outputs) == [each.tokens for each in expected(8)]
    Inside(llm).assert_idle()


def test_cached_pages_are_reused_and_hold_the_same_keys(start: Any) -> None:
    llm = start(8)
    shared = requests(8)[-1].prompt
    asked = [Asked((*shared[:-n], *shared[:n]), 24) for n in (1, 5, 40)]
    wanted = [
        answer(model_of(SPEC), each.prompt, each.length, mask_id=maker.MASK_ID, block=8).tokens
        for each in asked
    ]
    for hits in (False, True):
        outputs = [ask(llm, [each])[0] for each in asked]
        assert tokens_of(outputs) == wanted
        assert all(output.num_cached_tokens >= 64 for output in outputs) is hits
    first, more = requests(8)[-1], 24
    said = tokens_of(ask(llm, [Asked(first.prompt, 61)]))[0]
    turn = Asked((*first.prompt, *said, *first.prompt[:9]), more)
    (output,) = ask(llm, [turn])
    # The last block was never committed, and its page is not in the cache.
    assert output.num_cached_tokens == (len(first.prompt) + 61 - 8) // PAGE * PAGE
    assert (
        output.outputs[0].token_ids
        == answer(model_of(SPEC), turn.prompt, more, mask_id=maker.MASK_ID, block=8).tokens
    )


def test_experts_say_what_the_dense_loop_says(
    engine_pool: EnginePool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint = maker.make_tiny_checkpoint(tmp_path_factory.mktemp("sdar_moe"), EXPERTS)
    llm = engine_pool.get(checkpoint, hf_overrides={"block_size": 8}, block_size=PAGE)
    wanted = expected(8, EXPERTS)
    for fused in (True, False):
        outputs = ask(llm, requests(8), logprobs=1, extra_args={"diffusion_fused_commit": fused})
        assert tokens_of(outputs) == [each.tokens for each in wanted]
        assert_log_probs(outputs, wanted)
