"""The temperature of a denoising step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def linear_temperature(step: Tensor, max_steps: Tensor, t_min: Tensor, t_max: Tensor) -> Tensor:
    """T = t_min + (t_max - t_min) * n / N, where n counts the remaining steps N..1.

    Args:
        step: [B] int, steps already taken on this canvas (0 on the first).
        max_steps: [B] int, N.
        t_min: [B] fp64, reached in the limit n -> 0.
        t_max: [B] fp64, the temperature of the first step.

    Returns:
        [B] fp32.

    Source: ``LinearTemperatureScheduleLogitsProcessor`` of Transformers' diffusion_gemma.
    """
    remaining = (max_steps - step).clamp(min=1).float()
    # The source subtracts Python floats before an fp32 tensor is involved. Subtracting values
    # already rounded to fp32 changes the last bit for ranges such as 0.3..0.7.
    span = (t_max - t_min).float()
    return t_min.float() + span * (remaining / max_steps)
