"""min_p, top_k and top_p against Transformers' warpers, their order, ties and neutral values."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import for_each
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vllm_diffusion.constrain import truncate as module
from vllm_diffusion.constrain.rewrite import Truncation
from vllm_diffusion.constrain.truncate import nucleus, truncate

ROWS, VOCAB = 40, 60


def cut(min_p: float = 0.0, top_k: int = VOCAB, top_p: float = 1.0) -> Truncation:
    return Truncation(
        min_p=torch.tensor([min_p]),
        top_k=torch.tensor([top_k]),
        top_p=torch.tensor([top_p]),
        sorts=top_k < VOCAB or top_p < 1,
    )


def random_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


FIRST = torch.zeros(ROWS, dtype=torch.int64)


@for_each(top_k=[1, 2, 7, VOCAB - 1, VOCAB])
def test_top_k(top_k: int) -> None:
    logits = random_logits()
    assert torch.equal(
        truncate(logits, cut(top_k=top_k), FIRST), TopKLogitsWarper(top_k)(None, logits)
    )


@for_each(top_p=[1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(top_p: float) -> None:
    logits = random_logits(1)
    assert torch.equal(
        truncate(logits, cut(top_p=top_p), FIRST), TopPLogitsWarper(top_p)(None, logits)
    )


@for_each(min_p=[1e-4, 0.05, 0.5, 1.0])
def test_min_p(min_p: float) -> None:
    logits = random_logits(2)
    assert torch.equal(
        truncate(logits, cut(min_p=min_p), FIRST), MinPLogitsWarper(min_p)(None, logits)
    )


@pytest.mark.parametrize(
    ("top_p", "least"), [(0.25, 3), (0.5, 3), (0.5625, 2), (0.75, 2), (1, -torch.inf)]
)
def test_a_set_that_reaches_top_p_exactly_takes_no_more(top_p: float, least: float) -> None:
    ordered, weight = torch.tensor([[3.0, 2, 1]]), torch.tensor([[0.5, 0.25, 0.125]])
    total = torch.ones(1, 1, dtype=torch.float64)
    assert nucleus(ordered, weight, total, torch.tensor([float(top_p)])).item() == least


def test_the_order_is_min_p_then_top_k_then_top_p_of_what_is_left() -> None:
    logits = random_logits(3)
    expected = MinPLogitsWarper(0.02)(None, logits)
    expected = TopKLogitsWarper(6)(None, expected)
    expected = TopPLogitsWarper(0.8)(None, expected)
    result = truncate(logits, cut(0.02, 6, 0.8), FIRST)
    assert torch.equal(result, expected)
    assert not torch.equal(result, TopPLogitsWarper(0.8)(None, logits)), "top_p saw what is left"


def test_every_row_is_cut_as_its_canvas_asks_and_neutral_canvases_keep_every_bit() -> None:
    logits = random_logits(4)
    both = Truncation(
        min_p=torch.tensor([0.0, 0.1, 0.0]),
        top_k=torch.tensor([VOCAB, VOCAB, 3]),
        top_p=torch.tensor([1.0, 0.7, 1.0]),
        sorts=True,
    )
    canvas = torch.arange(ROWS) % 3
    result = truncate(logits, both, canvas)
    for index, alone in enumerate([cut(), cut(0.1, VOCAB, 0.7), cut(0.0, 3, 1.0)]):
        rows = canvas == index
        assert torch.equal(result[rows], truncate(logits[rows], alone, FIRST[rows]))
    assert torch.equal(result[canvas == 0], logits[canvas == 0])


def test_ties_stay_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    one = torch.zeros(1, dtype=torch.int64)
    for truncation in (cut(top_k=2), cut(top_p=0.6)):
        kept = truncate(logits, truncation, one).isfinite()[0].tolist()
        assert kept == [True, True, True, True, False]


def test_masked_ids_stay_masked_and_do_not_count_as_kept() -> None:
    logits = random_logits(5)
    logits[:, ::2] = -torch.inf
    result = truncate(logits, cut(top_k=4), FIRST)
    assert result.isfinite().sum(dim=1).tolist() == [4] * ROWS
    assert not bool(result[:, ::2].isfinite().any())


@pytest.mark.parametrize("truncation", [cut(1.0), cut(top_k=1), cut(top_p=1e-9), cut(1.0, 1, 1e-9)])
def test_the_best_id_always_stays(truncation: Truncation) -> None:
    logits = random_logits(6)
    result = truncate(logits, truncation, FIRST)
    assert torch.equal(result.argmax(1), logits.argmax(1))
    assert result.isfinite().sum(1).tolist() == [1] * ROWS


@for_each(rows=[1, 3, ROWS])
def test_rows_sorted_a_few_at_a_time_are_cut_alike(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, truncation = random_logits(7), cut(0.01, 9, 0.8)
    expected = truncate(logits, truncation, FIRST)
    monkeypatch.setattr(module, "_SORTED_AT_ONCE", rows * VOCAB)
    assert torch.equal(truncate(logits, truncation, FIRST), expected)
