"""The soft embedding of few ids, or of none: an approximation, and nothing else may change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import for_each
from helpers.classes import COUNT, classes_of
from helpers.heads import (
    SCALE,
    Case,
    assert_no_worse,
    assert_same_shape,
    assert_same_tokens,
    make_case,
    over_ranks,
    pairs_of,
)

from vllm_diffusion.head import sample, soft
from vllm_diffusion.head.best import Best
from vllm_diffusion.head.soft import most_likely

COUNTS = (0, 8, -1, 64, 16)


def counts(case: Case) -> torch.Tensor:
    return torch.tensor(COUNTS)[torch.arange(len(case.hidden)) % len(COUNTS)]


@for_each(seed=range(3), tile=[16, 128, 4096], rewrite=[False, True])
def test_it_is_that_of_the_reference(
    seed: int, tile: int, rewrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "TILE", tile)
    case = make_case(seed, rewrite=rewrite)
    top_k = counts(case)
    truth = case.reference(torch.float64)(case.rows(soft_top_k=top_k))
    plain = case.reference()(case.rows(soft_top_k=top_k))
    ours = case.streaming()(case.rows(soft_top_k=top_k))
    assert_same_shape(ours, plain)
    assert_same_tokens(ours, truth)
    assert_no_worse(ours, plain, truth)


def test_it_is_the_mean_of_the_most_likely_embeddings() -> None:
    case = make_case(3)
    truth = case.reference(torch.float64)
    logits = truth.logits(case.hidden) / case.temperature[:, None]
    best = logits.topk(8, dim=1)
    weight = best.values.softmax(dim=1)[:, :, None]
    expected = (weight * case.embedding.double()[best.indices]).sum(dim=1) * SCALE
    eight = torch.full((len(case.hidden),), 8)
    ours = case.streaming()(case.rows(soft_top_k=eight)).soft_embedding
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    assert float((ours - case.streaming()(case.rows()).soft_embedding).abs().max()) > 1.0


@for_each(rewrite=[False, True])
def test_every_other_statistic_keeps_every_bit(rewrite: bool) -> None:
    case = make_case(4, rewrite=rewrite)
    exact = case.streaming()(case.rows())
    near = case.streaming()(case.rows(soft_top_k=counts(case)))
    for name, one, other in pairs_of(near, exact):
        if name != "soft_embedding":
            assert torch.equal(one, other), name
    zeros = counts(case) == -1
    assert bool((near.soft_embedding[zeros] == 0).all())
    same = counts(case) == 0
    torch.testing.assert_close(near.soft_embedding[same], exact.soft_embedding[same])


def test_a_row_is_the_same_beside_any_others_where_bf16_ties(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    case = make_case(5, dtype=torch.bfloat16)
    case = replace(case, hidden=case.hidden.mul(4).round().div(4))
    top_k = torch.full((len(case.hidden),), 16)
    together = case.streaming()(case.rows(soft_top_k=top_k)).soft_embedding
    logits = case.reference().logits(case.hidden)
    best = logits.sort(dim=1, descending=True).values
    assert bool((best[:, 15] == best[:, 16]).any()), "no tie decides which ids are taken"
    for row in range(0, len(case.hidden), 7):
        # Other places of the same ids among the candidates: another order of the other rows.
        other = torch.tensor([row, (row + 11) % len(case.hidden)])
        part = case.streaming()(case.rows(soft_top_k=top_k).take(other))
        torch.testing.assert_close(part.soft_embedding[0], together[row], rtol=0.02, atol=0.02)


def test_where_too_many_are_equally_good_the_argmax_stands_alone() -> None:
    case = make_case(6, vocab=300)
    case = replace(case, hidden=torch.zeros_like(case.hidden))  # every logit is 0
    eight = torch.full((len(case.hidden),), 8)
    truth = case.reference()(case.rows(soft_top_k=eight))
    ours = case.streaming()(case.rows(soft_top_k=eight))
    assert torch.equal(ours.argmax, truth.argmax)
    torch.testing.assert_close(ours.soft_embedding, truth.soft_embedding)
    torch.testing.assert_close(ours.soft_embedding[0], case.embedding[0] * SCALE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_take_the_same_ids(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    case = make_case(7, vocab=512, rewrite=True)
    top_k = counts(case)
    truth = case.reference(torch.float64)(case.rows(soft_top_k=top_k))
    plain = case.reference()(case.rows(soft_top_k=top_k))
    for ours in over_ranks(case, ranks, lambda head: head(case.rows(soft_top_k=top_k))):
        assert_same_tokens(ours, truth)
        assert_no_worse(ours, plain, truth)


def test_the_second_product_is_of_the_rows_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(8)
    products: list[int] = []
    inner = soft.SoftEmbedding.add

    def counted(self, weight, shrink, first):
        products.append(len(self._soft))
        inner(self, weight, shrink, first)

    monkeypatch.setattr(soft.SoftEmbedding, "add", counted)
    case.streaming()(case.rows(soft_top_k=counts(case)))
    assert products == [len(case.hidden) // len(COUNTS)]


def test_most_likely_takes_no_part_of_a_tie() -> None:
    values = torch.tensor([[5.0, 4, 4, 3], [5, 4, 3, 3], [1, 1, 1, 1], [4, 3, 2, 1]])
    chosen = most_likely(values, torch.tensor([2, 2, 2, 0]))
    assert chosen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]


@for_each(width=[64, 100, 256], count=[1, 16, 300])
def test_the_best_over_tiles_are_the_best(width: int, count: int) -> None:
    values = torch.randn(20, 2048, generator=torch.Generator().manual_seed(count))
    best = Best(count)
    for first in range(0, 2048, width):
        best.add(values[:, first : first + width], first)
    ours, ids = best.over_ranks(make_case().vocabulary())
    assert torch.equal(ours, values.topk(count, dim=1).values)
    assert torch.equal(values.gather(1, ids), ours)


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_model_that_is_not_conditioned_on_it_pays_for_none(*, rewrite: bool) -> None:
    case = make_case(9, rewrite=rewrite)
    rows, classes = case.rows(self_conditioning=False), classes_of(700)
    # Whoever asked for the embedding would find none.
    vocabulary = replace(case.vocabulary(), embedding=None)
    without = [
        replace(case.streaming(), vocabulary=vocabulary),
        replace(case.reference(), soft_embedding=None),
    ]
    for head, plain in zip(without, (case.streaming(), case.reference()), strict=True):
        ours, by_class = head.by_class(rows, class_of=classes, num_classes=COUNT)
        theirs, same = plain.by_class(case.rows(), class_of=classes, num_classes=COUNT)
        for stats, beside in ((head(rows), plain(case.rows())), (ours, theirs)):
            assert stats.soft_embedding is None
            for name in ("argmax", "sample", "entropy", "top_prob", "margin"):
                assert torch.equal(getattr(stats, name), getattr(beside, name)), name
        assert torch.equal(by_class.sample, same.sample)
        assert torch.equal(by_class.entropy, same.entropy)
