"""All rewrites together, in their order, row by row; and the head that applies them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.cases import for_each
from helpers.heads import pairs_of

from vllm_diffusion.constrain.logits import rewrite_logits, truncate_logits
from vllm_diffusion.constrain.rewrite import Penalties, Rewrite, Truncation
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.records import Noise

LENGTH, VOCAB = 6, 24
CANVASES = 3
ROWS = CANVASES * LENGTH
INF = float("inf")


def full_rewrite() -> Rewrite:
    """Canvas 0 asks for nothing, 1 for bias, penalties and truncation, 2 for masks and a pin."""
    forbidden = torch.full((ROWS, 2), -1)
    forbidden[13:15, 0] = 4
    forbidden[14, 1] = 6
    pinned = torch.full((ROWS,), -1)
    pinned[16] = 4  # not even allowed: a pin wins
    return Rewrite(
        canvas=torch.arange(CANVASES).repeat_interleave(LENGTH),
        greedy=torch.tensor([False, False, True]),
        allowed=torch.tensor([[-1, -1, -1], [-1, -1, -1], [6, 9, 2]]),
        bias=(torch.tensor([[0, 0], [3, 5], [0, 0]]), torch.tensor([[0, 0], [2.0, -9], [0, 0]])),
        penalties=Penalties(
            ids=torch.tensor([[1, 1], [3, 8], [2, 2]]),
            scale=torch.tensor([[1.0, 1], [2, 2], [1, 1]]),
            offset=torch.tensor([[0.0, 0], [0.5, 0.5], [0, 0]]),
        ),
        forbidden=forbidden,
        pinned=pinned,
        truncation=Truncation(
            min_p=torch.tensor([0.0, 0.01, 0.0]),
            top_k=torch.tensor([VOCAB, 5, VOCAB]),
            top_p=torch.tensor([1.0, 0.9, 1.0]),
            sorts=True,
        ),
    )


def random_rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def rows_of(
    logits: torch.Tensor, temperature: float | torch.Tensor = 1.0, rewrite: Rewrite | None = None
) -> Rows:
    """[R, V] logits, as the hidden rows of a head that passes them on."""
    counter = torch.arange(len(logits))
    return Rows(
        hidden=logits,
        temperature=torch.as_tensor(temperature).expand(len(logits)),
        noise=Noise(
            seed=torch.tensor([5, 6]).expand(len(logits), 2), position=counter, step=counter * 0
        ),
        rewrite=rewrite,
    )


def make_head(max_rows: int = 100) -> ReferenceHead:
    return ReferenceHead(
        logits=lambda hidden: hidden, soft_embedding=lambda prob: prob, max_rows=max_rows
    )


def test_every_part_reaches_its_rows_and_no_other() -> None:
    logits = random_rows()
    result = rewrite_logits(logits, full_rewrite())
    assert torch.equal(result[:6], logits[:6])
    expected = logits[6:12].clone()
    expected[:, 3] += 2.0
    expected[:, 5] -= 9.0
    for token in (3, 8):
        value = expected[:, token]
        expected[:, token] = torch.where(value > 0, value / 2, value * 2) - 0.5
    assert torch.equal(result[6:12], expected)
    alive = [set(row.isfinite().nonzero().flatten().tolist()) for row in result[12:]]
    # At row 14 an id that is forbidden was allowed, at 13 it was not.
    assert alive == [{6, 9, 2}, {6, 9, 2}, {9, 2}, {6, 9, 2}, {4}, {6, 9, 2}]


def test_bias_comes_before_penalties() -> None:
    logits = torch.tensor([[-1.0, 0.0]])
    rewrite = Rewrite(
        canvas=torch.zeros(1, dtype=torch.int64),
        bias=(torch.tensor([[0]]), torch.tensor([[3.0]])),
        penalties=Penalties(
            ids=torch.tensor([[0]]), scale=torch.tensor([[2.0]]), offset=torch.zeros(1, 1)
        ),
    )
    # -1 + 3 = 2 is positive and divided; penalised first it would be -2 + 3.
    assert rewrite_logits(logits, rewrite).tolist() == [[1.0, 0.0]]


def test_truncation_is_of_the_scaled_distribution() -> None:
    # At temperature 1 the second id is above min_p, at a quarter of it not.
    truncation = Truncation(
        min_p=torch.tensor([0.2]), top_k=torch.tensor([3]), top_p=torch.ones(1), sorts=False
    )
    rewrite = Rewrite(canvas=torch.zeros(1, dtype=torch.int64), truncation=truncation)
    logits = torch.tensor([[3.0, 2.0, 0.0]])
    warm = make_head()(rows_of(logits, 1.0, rewrite))
    cold = make_head()(rows_of(logits, 0.25, rewrite))
    assert float(warm.margin) == pytest.approx(0.4621172)
    assert float(cold.margin) == 1.0
    assert float(cold.entropy) == 0.0


def test_all_statistics_are_of_the_rewritten_distribution() -> None:
    rewrite, logits = full_rewrite(), random_rows(1)
    temperature = torch.linspace(0.4, 1.1, ROWS)
    stats = make_head()(rows_of(logits, temperature, rewrite))
    changed = truncate_logits(rewrite_logits(logits, rewrite) / temperature[:, None], rewrite)
    plain = make_head()(rows_of(changed))
    for name, ours, theirs in pairs_of(stats, plain):
        if name == "sample":
            assert torch.equal(ours[:12], theirs[:12])
            assert torch.equal(ours[12:], stats.argmax[12:]), "greedy keeps the argmax"
        else:
            assert torch.equal(ours, theirs), name
    assert float(stats.entropy[16]) == 0.0
    assert int(stats.argmax[16]) == int(stats.sample[16]) == 4


def test_a_canvas_that_asks_for_nothing_keeps_every_bit_beside_others() -> None:
    logits = random_rows(2)
    mixed = make_head()(rows_of(logits, 0.7, full_rewrite()))
    alone = make_head()(rows_of(logits, 0.7))
    for _, one, other in pairs_of(mixed, alone):
        assert torch.equal(one[:6], other[:6])


@for_each(max_rows=[1, 4, 7])
def test_chunks_equal_the_whole(max_rows: int) -> None:
    rows = rows_of(random_rows(3), 0.7, full_rewrite())
    whole, parts = make_head()(rows), make_head(max_rows)(rows)
    for _, one, other in pairs_of(whole, parts):
        assert torch.equal(one, other)
    assert torch.equal(make_head().candidates(rows, 4), make_head(max_rows).candidates(rows, 4))


def test_candidates_are_the_best_ids_that_may_stand_there() -> None:
    logits, rewrite = random_rows(4), full_rewrite()
    rows = rows_of(logits, rewrite=rewrite)
    best = make_head().candidates(rows, 4)
    changed = rewrite_logits(logits, rewrite)
    for row in range(ROWS):
        order = changed[row].argsort(descending=True).tolist()
        expected = [token if changed[row, token] > -INF else -1 for token in order[:4]]
        assert best[row].tolist() == expected
    assert make_head().candidates(rows, 100).shape == (ROWS, VOCAB)


def test_a_rewrite_of_nothing_is_nothing() -> None:
    empty = Rewrite(canvas=torch.zeros(ROWS, dtype=torch.int64))
    logits = random_rows(5)
    assert rewrite_logits(logits, empty) is logits
    assert truncate_logits(logits, empty) is logits


def test_take_cuts_what_is_told_by_row_and_keeps_what_is_told_by_canvas() -> None:
    rewrite = full_rewrite()
    part = rewrite.take(slice(13, 17))
    logits = random_rows(6)
    assert torch.equal(rewrite_logits(logits[13:17], part), rewrite_logits(logits, rewrite)[13:17])
    assert part.take(slice(0, 0)).canvas.tolist() == []
    without = replace(rewrite, forbidden=None, pinned=None).take(slice(0, 2))
    assert without.forbidden is None
    assert without.pinned is None
