"""What a position is ranked by: the six scores, each canvas by its own."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import for_each
from torch import Tensor

from vllm_diffusion.denoise.constants import PROBABILITIES, REVEAL_BY
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.denoise.score import scores
from vllm_diffusion.records import CanvasStats

LENGTH, VOCAB = 6, 40


def stats_of(logits: Tensor, temperature: float) -> tuple[CanvasStats, Tensor, Tensor]:
    """Statistics [B, L] of drawn tokens, and both distributions they are about."""
    own, drawn = logits.softmax(-1), (logits / temperature).softmax(-1)
    sample = torch.multinomial(drawn.flatten(0, 1), 1).view(logits.shape[:2])
    best = drawn.topk(2).values
    stats = CanvasStats(
        argmax=drawn.argmax(-1),
        sample=sample,
        entropy=-torch.xlogy(drawn, drawn).sum(-1),
        top_prob=best[..., 0],
        margin=best[..., 0] - best[..., 1],
        soft_embedding=None,
        sample_prob=drawn.gather(-1, sample[..., None])[..., 0],
        own_prob=own.gather(-1, sample[..., None])[..., 0],
    )
    return stats, own, drawn


def key(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.tensor([split_seed(number) for number in range(batch)])
    return seed, torch.arange(LENGTH) + torch.arange(batch)[:, None], torch.arange(batch)


def test_each_score_is_what_it_is_called() -> None:
    torch.manual_seed(0)
    stats, own, drawn = stats_of(torch.randn(1, LENGTH, VOCAB) * 3, 0.6)
    found = {
        name: scores(torch.tensor([at]), (name,), stats, *key(1))[0]
        for at, name in enumerate(REVEAL_BY)
    }
    for at in range(LENGTH):
        token = int(stats.sample[0, at])
        assert float(found["drawn"][at]) == float(drawn[0, at, token])
        assert float(found["model"][at]) == float(own[0, at, token])
        second, first = sorted(drawn[0, at].tolist())[-2:]
        assert float(found["margin"][at]) == pytest.approx(first - second)
    # The sharper distribution is the surer one, the first place the surest.
    assert torch.equal(found["entropy"].sort().indices, stats.entropy[0].sort(descending=True)[1])
    assert found["leftmost"].sort(descending=True).indices.tolist() == list(range(LENGTH))
    for name in PROBABILITIES:
        assert 0 <= float(found[name].min()) <= float(found[name].max()) <= 1


@for_each(batch=[1, 6, 12])
def test_every_canvas_of_a_batch_is_ranked_by_its_own(batch: int) -> None:
    torch.manual_seed(batch)
    stats, *_ = stats_of(torch.randn(batch, LENGTH, VOCAB), 0.8)
    seed, position, step = key(batch)
    by = torch.arange(batch) % len(REVEAL_BY)
    asked = [name for at, name in enumerate(REVEAL_BY) if at in by]
    together = scores(by, asked, stats, seed, position, step)
    for row in range(batch):
        one = slice(row, row + 1)
        alone = scores(
            by[one], (REVEAL_BY[by[row]],), stats.take(one), seed[one], position[one], step[one]
        )
        assert torch.equal(together[one], alone)


def test_random_order_depends_on_seed_position_and_step_alone() -> None:
    stats, *_ = stats_of(torch.randn(1, LENGTH, VOCAB), 1.0)
    seed, position, step = key(1)

    def random(seed: Tensor, position: Tensor, step: Tensor) -> list[float]:
        found: list[float] = scores(torch.tensor([4]), ("random",), stats, seed, position, step)[
            0
        ].tolist()
        return found

    plain = random(seed, position, step)
    assert random(seed, position.flip(1), step) == plain[::-1]
    assert not set(random(seed + 1, position, step)) & set(plain)
    assert not set(random(seed, position, step + 1)) & set(plain)


def test_every_open_position_is_drawn_as_often_as_any_other() -> None:
    count = 3000
    seed = torch.tensor([split_seed(number) for number in range(count)])
    stats = CanvasStats.zeros(torch.zeros(count * LENGTH, 1)).reshape(count, LENGTH)
    position = torch.arange(LENGTH).expand(count, LENGTH)
    drawn = scores(seed[:, 0] * 0 + 4, ("random",), stats, seed, position, seed[:, 0] * 0)
    first = torch.bincount(drawn.argmax(1), minlength=LENGTH).double()
    expected = count / LENGTH
    # Five degrees of freedom: chi-square exceeds 30 with probability 1.5e-5.
    assert float(((first - expected) ** 2 / expected).sum()) < 30
