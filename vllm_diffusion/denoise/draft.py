"""A draft that a canvas begins with: which of its tokens become noise, and where it sets in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_diffusion.denoise.rng import Purpose, philox, split_seed, uniform

if TYPE_CHECKING:
    from collections.abc import Sequence


def begun_from_draft(
    draft: Sequence[int], *, pinned: Sequence[int], level: float, seed: int, start: int, steps: int
) -> tuple[tuple[int, ...], int]:
    """The seed canvas that a draft becomes, and its first step.

    Args:
        draft, level, seed, start: see ``noised_draft``.
        pinned: places of the draft that keep their token.
        steps: of the whole schedule.
    """
    noised = noised_draft(draft, seed=seed, start=start, level=level)
    for at in pinned:
        noised[at] = draft[at]
    return tuple(noised), first_step(level, steps)


def noised_draft(draft: Sequence[int], *, seed: int, start: int, level: float) -> list[int]:
    """A draft in which a share of the positions is left to the noise of a new canvas.

    Each position is drawn by itself, as in training. At level 1 nothing is left of the draft, and
    a canvas that begins from it is one that begins from none.

    Args:
        draft: token ids.
        seed: 64-bit key of the request's noise.
        start: absolute position of the first token.
        level: share of noise, above 0 and at most 1.

    Returns:
        As many token ids, -1 where noise stands.
    """
    position = start + torch.arange(len(draft))
    step = position.new_zeros(())
    word = philox(torch.tensor(split_seed(seed)), position, step, Purpose.DRAFT)[0]
    kept = (uniform(word) >= level).tolist()
    return [token if keep else -1 for token, keep in zip(draft, kept, strict=True)]


def first_step(level: float, max_steps: int) -> int:
    """The step of a schedule at which a canvas has this share of noise; at least one is left."""
    return max_steps - max(1, round(level * max_steps))
