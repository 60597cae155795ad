"""The tiled categorical draw: right in distribution, silent about impossible ids, batch-blind."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import for_each
from helpers.frequencies import assert_frequencies
from torch import Tensor

from vllm_diffusion.head import sample as module
from vllm_diffusion.head.sample import TILE, sample_rows, tile_uniforms
from vllm_diffusion.records import Noise

ROWS = 4000


def noise(rows: int, *, seed: int = 5, first: int = 0) -> Noise:
    return Noise(
        seed=torch.tensor([seed, 0]).expand(rows, 2),
        position=torch.arange(first, first + rows),
        step=torch.zeros(rows, dtype=torch.int64),
    )


def draw(weight: Tensor, rows: int, *, seed: int = 5) -> Tensor:
    """Draw ``rows`` times from one weight vector, in chunks that fit in memory."""
    chunk = max(1, (1 << 24) // weight.numel())
    return torch.cat(
        [
            sample_rows(weight.expand(n, -1), noise(n, seed=seed, first=first))
            for first in range(0, rows, chunk)
            for n in (min(chunk, rows - first),)
        ]
    )


# Smaller than a tile, a whole tile, one id over, a ragged last tile, and many tiles.
@for_each(vocab=[2, 37, 512, TILE, TILE + 1, 3 * TILE + 17, 16 * TILE])
def test_frequencies_are_the_softmax(vocab: int) -> None:
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    assert_frequencies(draw(logits.softmax(-1), 3 * ROWS), logits.double().softmax(-1))


@for_each(vocab=[37, 3 * TILE + 17])
def test_weights_need_not_be_normalised(vocab: int) -> None:
    weight = torch.rand(vocab, generator=torch.Generator().manual_seed(1))
    for scale in (1e-6, 1e6):
        assert torch.equal(draw(weight * scale, 500), draw(weight, 500))


@for_each(tile=[8, 64])
def test_a_narrow_tile_gives_the_same_distribution(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many tiles of few ids make both halves of the draw, choice of tile and choice inside, visible
    # at once; at the real width a wrong tile law would hide behind thousands of rare ids.
    monkeypatch.setattr(module, "TILE", tile)
    logits = torch.randn(201, generator=torch.Generator().manual_seed(3)) * 2
    assert_frequencies(draw(logits.softmax(-1), 60_000), logits.double().softmax(-1))


@for_each(vocab=[64, TILE + 5, 4 * TILE])
def test_ids_of_zero_weight_are_never_drawn(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    weight = torch.rand(ROWS, vocab, generator=generator)
    weight[torch.rand(ROWS, vocab, generator=generator) < 0.9] = 0
    weight[:, 0] = weight[:, -1] = 0
    weight[:, vocab // 2] += 1e-3
    drawn = sample_rows(weight, noise(ROWS))
    assert bool((weight.gather(1, drawn[:, None]) > 0).all())


@for_each(only=[0, 1, TILE - 1, TILE, 2 * TILE + 16])
def test_a_certain_row_draws_its_only_id(only: int) -> None:
    weight = torch.zeros(2 * TILE + 17)
    weight[only] = 1e-20
    assert bool((draw(weight, 300) == only).all())


@for_each(word=[0, 0xFFFFFFFF])
def test_the_extreme_uniforms_stay_inside_the_support(
    word: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first and last word Philox can give, beside tiles that hold nothing.
    words = tuple(torch.full((1, 3), word) for _ in range(4))
    monkeypatch.setattr(module, "philox", lambda *_: words)
    weight = torch.zeros(1, 3 * TILE)
    weight[0, TILE + 7 : TILE + 11] = torch.tensor([0.25, 0.0, 0.5, 0.25])
    drawn = int(sample_rows(weight, noise(1)))
    assert drawn == (TILE + 7 if word == 0 else TILE + 10)


@pytest.mark.parametrize("beyond", range(3))
def test_a_uniform_on_the_edge_of_a_bin_stays_inside_the_support(
    beyond: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The inversion subtracts running sums; what rounding leaves may fall before the bin's first
    # mass. Every bin here begins and ends with ids of zero weight.
    size = TILE // 64
    weight = torch.rand(ROWS, 8 * size, generator=torch.Generator().manual_seed(8)) ** 8
    weight[:, ::size] = weight[:, size - 1 :: size] = 0
    running = weight.view(ROWS, 8, size).sum(-1).cumsum(-1)
    for edge in range(8):
        target = running[:, edge] / running[:, -1]
        for _ in range(beyond):
            target = torch.nextafter(target, torch.tensor(1.0))
        uniforms = torch.full((ROWS, 1), 0.5), target[:, None]
        monkeypatch.setattr(module, "tile_uniforms", lambda *_, both=uniforms: both)
        drawn = sample_rows(weight, noise(ROWS))
        assert bool((weight.gather(1, drawn[:, None]) > 0).all())


def test_padding_of_the_last_tile_is_never_drawn() -> None:
    vocab = TILE + 3
    assert int(draw(torch.ones(vocab), ROWS).max()) < vocab


@for_each(vocab=[100, 2 * TILE + 1])
def test_a_row_draws_the_same_alone_in_any_batch_and_in_any_order(vocab: int) -> None:
    weight = torch.randn(20, vocab, generator=torch.Generator().manual_seed(2)).softmax(-1)
    key = Noise(
        seed=torch.randint(1 << 32, (20, 2), generator=torch.Generator().manual_seed(3)),
        position=torch.arange(20) * 13,
        step=torch.arange(20) % 4,
    )
    together = sample_rows(weight, key)
    for row in range(20):
        one = slice(row, row + 1)
        assert int(sample_rows(weight[one], key.take(one))) == int(together[row])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(4))
    shuffled = Noise(seed=key.seed[order], position=key.position[order], step=key.step[order])
    assert torch.equal(sample_rows(weight[order], shuffled), together[order])


def test_every_part_of_the_key_changes_the_draw() -> None:
    weight = torch.ones(1000, 512)
    base = noise(1000)
    later = Noise(seed=base.seed, position=base.position, step=base.step + 1)
    elsewhere = Noise(seed=base.seed, position=base.position + 1000, step=base.step)
    other = noise(1000, seed=6)
    draws = [sample_rows(weight, key) for key in (base, later, elsewhere, other)]
    for i, one in enumerate(draws):
        for two in draws[:i]:
            assert int((one == two).sum()) < 20  # 2 expected of independent draws


def test_the_two_uniforms_of_a_tile_and_those_of_its_neighbours_differ() -> None:
    gumbel, inside = tile_uniforms(noise(50), 8)
    assert gumbel.shape == inside.shape == (50, 8)
    assert len(torch.cat([gumbel, inside]).unique()) == 800
