"""Penalties over a text against counting by hand and against Transformers' processor."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from vllm_diffusion.constrain.penalties import penalise, text_penalties

if TYPE_CHECKING:
    from vllm_diffusion.constrain.rewrite import Penalties

VOCAB = 13


def random_text(seed: int, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB, (3, length), generator=generator)


def costs(
    text: torch.Tensor, length: list[int], prompt: list[int], **penalty: list[float]
) -> Penalties:
    neutral = {"repetition": [1.0] * 3, "frequency": [0.0] * 3, "presence": [0.0] * 3}
    return text_penalties(
        text,
        torch.tensor(length),
        torch.tensor(prompt),
        **{name: torch.tensor(values) for name, values in (neutral | penalty).items()},
    )


@for_each(seed=range(5))
def test_frequency_and_presence_count_the_output_alone(seed: int) -> None:
    text, length, prompt = random_text(seed), [20, 11, 1], [6, 11, 1]
    frequency, presence = [0.5, 1.0, 2.0], [0.25, -1.0, 0.5]
    cost = costs(text, length, prompt, frequency=frequency, presence=presence)
    logits = torch.randn(3, VOCAB)
    result = penalise(logits, cost.ids, cost.scale, cost.offset)
    for row in range(3):
        counts = Counter(text[row, prompt[row] : length[row]].tolist())
        for token in range(VOCAB):
            taken = frequency[row] * counts[token] + presence[row] * (counts[token] > 0)
            assert float(result[row, token]) == pytest.approx(float(logits[row, token]) - taken)


@for_each(penalty=[1.3, 0.7])
def test_repetition_counts_prompt_and_output_as_transformers_does(penalty: float) -> None:
    text, length = random_text(7), [20, 9, 1]
    cost = costs(text, length, [4, 9, 1], repetition=[penalty] * 3)
    logits = torch.randn(3, VOCAB)
    result = penalise(logits, cost.ids, cost.scale, cost.offset)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    for row in range(3):
        expected = processor(text[[row], : length[row]], logits[[row]].clone())[0]
        torch.testing.assert_close(result[row], expected)
    assert not torch.equal(result, logits)


def test_what_stands_behind_the_text_does_not_count() -> None:
    text = random_text(3)
    changed = text.clone()
    changed[:, 12:] = 5
    asked = {"frequency": [1.0] * 3, "repetition": [1.5] * 3}
    one = costs(text, [12] * 3, [3] * 3, **asked)
    other = costs(changed, [12] * 3, [3] * 3, **asked)
    logits = torch.randn(3, VOCAB)
    assert torch.equal(
        penalise(logits, one.ids, one.scale, one.offset),
        penalise(logits, other.ids, other.scale, other.offset),
    )


def test_no_penalty_changes_no_bit_and_keeps_forbidden_ids_forbidden() -> None:
    text = random_text(4)
    logits = torch.randn(3, VOCAB)
    logits[:, 2] = -torch.inf
    neutral = costs(text, [20] * 3, [5] * 3)
    assert torch.equal(penalise(logits, neutral.ids, neutral.scale, neutral.offset), logits)
    cost = costs(text, [20] * 3, [5] * 3, repetition=[2.0] * 3, presence=[-2.0] * 3)
    assert bool((penalise(logits, cost.ids, cost.scale, cost.offset)[:, 2] == -torch.inf).all())
