"""Initial canvases and renoise: uniform, reproducible, and never the same noise twice."""

from __future__ import annotations

import torch
from helpers.frequencies import assert_frequencies

from vllm_diffusion.denoise.renoise import initial_canvas, uniform_tokens

VOCAB = 61
SEED = torch.tensor([[17, 0]])


def test_initial_canvas_is_uniform_over_the_vocabulary() -> None:
    canvas = initial_canvas(SEED, torch.arange(30_000)[None], VOCAB)
    assert canvas.shape == (1, 30_000)
    assert canvas.dtype == torch.int64
    assert_frequencies(canvas[0], torch.ones(VOCAB))


def test_renoise_is_uniform_over_steps_of_one_position() -> None:
    step = torch.arange(30_000)
    tokens = uniform_tokens(SEED.expand(30_000, 2), torch.full((30_000, 1), 5), step, VOCAB)
    assert tokens.shape == (30_000, 1)
    assert_frequencies(tokens[:, 0], torch.ones(VOCAB))


def test_noise_follows_the_absolute_position_not_the_row() -> None:
    # A preempted request may come back with its canvas cut elsewhere; a position keeps its noise.
    long = initial_canvas(SEED, torch.arange(100, 164)[None], VOCAB)
    short = initial_canvas(SEED, torch.arange(116, 132)[None], VOCAB)
    assert torch.equal(short[0], long[0, 16:32])
    step = torch.tensor([3])
    assert torch.equal(
        uniform_tokens(SEED, torch.arange(116, 132)[None], step, VOCAB)[0],
        uniform_tokens(SEED, torch.arange(100, 164)[None], step, VOCAB)[0, 16:32],
    )


def test_initial_canvas_and_renoise_of_every_step_are_unrelated() -> None:
    position = torch.arange(4000)[None]
    draws = [initial_canvas(SEED, position, VOCAB)] + [
        uniform_tokens(SEED, position, torch.tensor([step]), VOCAB) for step in range(4)
    ]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            # Independent rows agree in 1 of VOCAB positions: 66 +- 8 of 4000.
            assert 30 < int((one == other).sum()) < 110


def test_requests_are_independent_and_the_batch_does_not_matter() -> None:
    seeds = torch.tensor([[1, 0], [2, 0], [1, 1]])
    position = torch.arange(50)[None].expand(3, 50)
    step = torch.tensor([0, 4, 4])
    together = uniform_tokens(seeds, position, step, VOCAB)
    for row in range(3):
        alone = uniform_tokens(
            seeds[row : row + 1], position[row : row + 1], step[row : row + 1], VOCAB
        )
        assert torch.equal(alone[0], together[row])
    assert len({tuple(row) for row in together.tolist()}) == 3
