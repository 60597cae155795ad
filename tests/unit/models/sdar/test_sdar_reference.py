"""The dense reference itself: what it is, and that its negative controls are different models."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.cases import for_each

from vllm_diffusion.models.sdar.testing.checkpoint import MASK_ID, TinySpec, build_model
from vllm_diffusion.models.sdar.testing.reference import answer, visible
from vllm_diffusion.testing.dense_reveal import Answer, dense_logits, leftmost

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK = 8
LENGTHS = (1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 3)


@pytest.fixture(scope="module")
def model() -> Any:
    return build_model(TinySpec(block=BLOCK))


def prompts(seed: int = 0) -> list[list[int]]:
    dice = Random(seed)
    return [[dice.randrange(10, 512) for _ in range(length)] for length in LENGTHS]


def answers(model: Any, length: int = 20, **how: Any) -> list[Answer]:
    return [answer(model, one, length, mask_id=MASK_ID, block=BLOCK, **how) for one in prompts()]


def different(left: Sequence[Answer], right: Sequence[Answer]) -> int:
    return sum(
        a != b
        for x, y in zip(left, right, strict=True)
        for a, b in zip(x.tokens, y.tokens, strict=True)
    )


def test_a_block_sees_itself_and_those_before_it() -> None:
    seen = visible(5, 2)
    assert seen.int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert visible(3, 2, anchor=1).int().tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    assert visible(4, 4, causal=2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], *[[1] * 4] * 2]


def test_a_later_block_changes_no_earlier_logits(model: Any) -> None:
    tokens = prompts()[-1]
    seen = visible(len(tokens), BLOCK)
    before = dense_logits(model, tokens, seen)
    other = [*tokens[:-1], tokens[-1] + 1 if tokens[-1] < 511 else 10]
    after = dense_logits(model, other, seen)
    first = (len(tokens) - 1) // BLOCK * BLOCK
    assert torch.equal(before[:first], after[:first])
    assert not (before[first:] == after[first:]).all(dim=1).any(), "its own block sees it"


def test_blocks_end_on_the_grid_and_the_answer_is_cut(model: Any) -> None:
    for prompt, found in zip(prompts(), answers(model), strict=True):
        assert len(found.tokens) == len(found.log_probs) == 20
        assert len(found.steps) == -(-(len(prompt) + 20) // BLOCK) - len(prompt) // BLOCK
        assert all(1 <= steps <= BLOCK for steps in found.steps)
        assert MASK_ID not in found.tokens


def test_the_schedule_alone_reveals_the_even_split(model: Any) -> None:
    # Five steps for eight positions reveal 2, 2, 2, 1, 1; a tail of the prompt leaves fewer.
    for prompt, found in zip(prompts(), answers(model, threshold=0, max_steps=5), strict=True):
        assert found.steps[1:] == [5] * (len(found.steps) - 1)
        left, steps = BLOCK - len(prompt) % BLOCK, 0
        while left > 0:
            left -= (2, 2, 2, 1, 1)[steps]
            steps += 1
        assert found.steps[0] == steps


def test_a_low_threshold_reveals_everything_at_once(model: Any) -> None:
    assert all(set(found.steps) == {1} for found in answers(model, threshold=1e-6))


def test_the_last_allowed_step_reveals_what_is_left(model: Any) -> None:
    assert all(set(found.steps) == {1} for found in answers(model, max_steps=1))


def test_an_answer_ends_behind_its_first_end(model: Any) -> None:
    whole = answers(model)
    for prompt, found in zip(prompts(), whole, strict=True):
        end = found.tokens[9]
        cut = answer(model, prompt, 20, mask_id=MASK_ID, block=BLOCK, ends={end})
        assert cut.tokens == found.tokens[: found.tokens.index(end) + 1]
        early = answer(model, prompt, 20, mask_id=MASK_ID, block=BLOCK, ends={end}, early=True)
        assert early.tokens == cut.tokens
        assert early.log_probs == cut.log_probs
        assert early.steps[:-1] == cut.steps[:-1]
        assert early.steps[-1] <= cut.steps[-1]


@for_each(
    wrong=[
        {"causal_prompt": True},
        {"grid_at_prompt_end": True},
        {"threshold": 0.5},
        {"surer": leftmost},
        {"max_steps": BLOCK - 1},
    ]
)
def test_what_is_wrong_is_noticed(model: Any, wrong: dict[str, Any]) -> None:
    right = answers(model, threshold=0)
    assert different(right, answers(model, **({"threshold": 0} | wrong))) > 5


def test_another_threshold_is_noticed(model: Any) -> None:
    assert different(answers(model, threshold=0.5), answers(model, threshold=0.5 * 1.2)) > 5
