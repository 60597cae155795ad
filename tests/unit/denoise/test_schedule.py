"""The temperature of every step, bit for bit the published processor's."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import for_each
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    LinearTemperatureScheduleLogitsProcessor,
)

from vllm_diffusion.denoise.schedule import linear_temperature

# The released constants first; the others have a t_max - t_min that fp32 rounds differently when
# the difference is taken of rounded ends.
RANGES = [(0.4, 0.8), (0.3, 0.7), (0.1, 1.0), (0.0, 1.3), (0.35, 0.8), (0.123456789, 0.987654321)]


@pytest.mark.parametrize(("t_min", "t_max"), RANGES)
@for_each(max_steps=[1, 2, 7, 8, 48, 50])
def test_equals_the_published_processor_bit_for_bit(
    t_min: float, t_max: float, max_steps: int
) -> None:
    processor = LinearTemperatureScheduleLogitsProcessor(t_min, t_max, max_steps)
    step = torch.arange(max_steps)
    ours = linear_temperature(
        step,
        torch.full((max_steps,), max_steps),
        torch.full((max_steps,), t_min, dtype=torch.float64),
        torch.full((max_steps,), t_max, dtype=torch.float64),
    )
    assert ours.dtype == torch.float32
    logits = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)) * 20
    for taken in range(max_steps):
        # The published loop counts the remaining steps, as an int32 tensor.
        remaining = torch.tensor(max_steps - taken, dtype=torch.int32)
        theirs = processor(None, logits, cur_step=remaining)
        assert torch.equal(logits / ours[taken], theirs), f"step {taken} of {max_steps}"


def test_runs_from_t_max_down_towards_t_min() -> None:
    steps = torch.arange(48)
    ours = linear_temperature(
        steps, torch.full((48,), 48), torch.tensor([0.4]), torch.tensor([0.8])
    )
    assert float(ours[0]) == pytest.approx(0.8)
    assert float(ours[-1]) == pytest.approx(0.4 + 0.4 / 48)
    assert bool((ours[1:] < ours[:-1]).all())


def test_every_canvas_has_its_own_step_and_range() -> None:
    ours = linear_temperature(
        torch.tensor([0, 24, 3]),
        torch.tensor([48, 48, 4]),
        torch.tensor([0.4, 0.4, 1.0]),
        torch.tensor([0.8, 0.8, 2.0]),
    )
    assert ours.tolist() == pytest.approx([0.8, 0.6, 1.25])


def test_a_step_past_the_last_stays_positive() -> None:
    # A slot that committed has a step count beyond any schedule until it begins again; its
    # temperature divides logits nobody reads, but must not be 0 or negative.
    late = linear_temperature(
        torch.tensor([8, 9]), torch.tensor([8, 8]), torch.zeros(2), torch.ones(2)
    )
    assert bool((late > 0).all())
