"""Start a canvas from a draft: which of its tokens become noise, and the step to start at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_diffusion.denoise.rng import Purpose, philox, split_seed, uniform

if TYPE_CHECKING:
    from collections.abc import Sequence


def seed_canvas_from_draft(
    draft: Sequence[int], *, pinned: Sequence[int], level: float, seed: int, start: int, steps: int
) -> tuple[tuple[int, ...], int]:
    """The seed canvas of a draft, and the step it starts at.

    Args:
        draft, level, seed, start: see ``noised_draft``.
        pinned: indices into the draft that keep their token.
        steps: steps of the whole schedule.
    """
    noised = noised_draft(draft, seed=seed, start=start, level=level)
    for at in pinned:
        noised[at] = draft[at]
    return tuple(noised), first_step(level, steps)


def noised_draft(draft: Sequence[int], *, seed: int, start: int, level: float) -> list[int]:
    """A draft with a share of its positions replaced by noise.

    Each position is drawn independently, as in training. Level 1 replaces the whole draft, which
    equals starting without one.

    Args:
        draft: token ids.
        seed: 64-bit key of the request's noise.
        start: absolute position of the first token.
        level: share of noise, above 0 and at most 1.

    Returns:
        The draft's ids, -1 where the canvas starts with noise.
    """
    position = start + torch.arange(len(draft))
    step = position.new_zeros(())
    word = philox(torch.tensor(split_seed(seed)), position, step, Purpose.DRAFT)[0]
    kept = (uniform(word) >= level).tolist()
    return [token if keep else -1 for token, keep in zip(draft, kept, strict=True)]


def first_step(level: float, max_steps: int) -> int:
    """The step of a schedule with this share of noise left; at least one step remains."""
    return max_steps - max(1, round(level * max_steps))
