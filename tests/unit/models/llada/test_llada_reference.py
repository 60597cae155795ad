"""The dense reference itself: what it is, and that its negative controls are different models."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion.models.llada.testing.checkpoint import MASK_ID, TinySpec, build_model
from vllm_diffusion.models.llada.testing.reference import answer
from vllm_diffusion.testing.dense_reveal import Answer, dense_logits, leftmost

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 8
LENGTH = 20
LENGTHS = (1, 7, 8, 19)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(TinySpec())


def prompts() -> list[list[int]]:
    dice = Random(0)
    return [[dice.randrange(10, 512) for _ in range(length)] for length in LENGTHS]


def answers(model: Any, **how: Any) -> list[Answer]:
    plain = {"mask_id": MASK_ID, "block": BLOCK, "max_steps": BLOCK}
    return [answer(model, one, LENGTH, **(plain | how)) for one in prompts()]


def different(left: Sequence[Answer], right: Sequence[Answer]) -> int:
    return sum(
        a != b
        for x, y in zip(left, right, strict=True)
        for a, b in zip(x.tokens, y.tokens, strict=True)
    )


def test_the_last_token_changes_the_first_logits(model: Any) -> None:
    tokens, seen = prompts()[-1], torch.ones(19, 19, dtype=torch.bool)
    other = [*tokens[:-1], 10 if tokens[-1] != 10 else 11]
    assert not torch.equal(
        dense_logits(model, tokens, seen)[0], dense_logits(model, other, seen)[0]
    )


def test_one_token_a_step(model: Any) -> None:
    for found in answers(model):
        assert found.steps == [8, 8, 4]
        assert len(found.tokens) == len(found.log_probs) == LENGTH
        assert MASK_ID not in found.tokens


def test_an_even_split_when_steps_are_fewer(model: Any) -> None:
    # 8 positions in 5 steps: 2, 2, 2, 1, 1. The last block has 4.
    assert all(found.steps == [5, 5, 4] for found in answers(model, max_steps=5))


def test_a_threshold_saves_steps(model: Any) -> None:
    whole, sure = answers(model), answers(model, threshold=0.5)
    assert sum(map(sum, (found.steps for found in sure))) < sum(sum(one.steps) for one in whole)
    assert all(set(found.steps) == {1} for found in answers(model, threshold=1e-9))


def test_an_answer_ends_behind_its_first_end(model: Any) -> None:
    for prompt, found in zip(prompts(), answers(model), strict=True):
        end = found.tokens[9]
        how: dict[str, Any] = {"mask_id": MASK_ID, "block": BLOCK, "max_steps": BLOCK}
        late = answer(model, prompt, LENGTH, ends={end}, **how)
        assert late.tokens == found.tokens[: found.tokens.index(end) + 1]
        early = answer(model, prompt, LENGTH, ends={end}, early=True, **how)
        assert early.tokens == late.tokens
        assert early.log_probs == late.log_probs
        assert sum(early.steps) <= sum(late.steps)


def drawn(step: int, place: int, score: float) -> float:
    return Random(1000 * step + place).random() + 0 * score


@for_each(
    wrong=[
        {"causal": True},
        {"horizon": False},
        {"block": 2 * BLOCK, "max_steps": 2 * BLOCK},
        {"threshold": 0.5},
        {"max_steps": BLOCK - 1},
        {"surer": leftmost},
        {"surer": drawn},
    ]
)
def test_what_is_wrong_is_noticed(model: Any, wrong: dict[str, Any]) -> None:
    assert different(answers(model), answers(model, **wrong)) > 5


def test_another_threshold_is_noticed(model: Any) -> None:
    assert different(answers(model, threshold=0.5), answers(model, threshold=0.5 * 1.2)) > 5
