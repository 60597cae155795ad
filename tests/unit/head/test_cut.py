"""min_p, top_k and top_p over tiles: the kept set of ``constrain.truncate``, ties and all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.cases import for_each
from helpers.heads import (
    Case,
    assert_no_worse,
    assert_same_tokens,
    counted_readings,
    make_case,
    over_ranks,
)

from vllm_diffusion.constrain.rewrite import Rewrite, Truncation
from vllm_diffusion.constrain.truncate import truncate
from vllm_diffusion.head import cut, logit_tiles, sample
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.stream import StreamingHead
from vllm_diffusion.head.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

VOCAB, ROWS, TILE = 300, 24, 16
EDGES = {
    "min_p": (0.0, 1e-6, 0.05, 0.9, 1.0),
    "top_k": (1, 2, 7, 40, 299, 300),
    "top_p": (1e-6, 0.3, 0.9, 0.9999, 1.0),
}


def random_cut(seed: int, rows: int = ROWS, vocab: int = VOCAB) -> Truncation:
    """A cut for every row, each of its three parts from the edges, off in half of the rows."""
    generator = torch.Generator().manual_seed(seed)

    def some(values: tuple, off: float) -> Tensor:
        chosen = torch.tensor(values)[torch.randint(len(values), (rows,), generator=generator)]
        return torch.where(torch.rand(rows, generator=generator) < 0.5, chosen, off)

    return Truncation(
        min_p=some(EDGES["min_p"], 0.0),
        top_k=some(EDGES["top_k"], vocab).clamp(max=vocab),
        top_p=some(EDGES["top_p"], 1.0),
        sorts=True,
    )


def random_logits(seed: int, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, VOCAB, generator=generator)
    logits *= torch.logspace(-2, 1, ROWS)[:, None]  # from flat to sharp
    if kind == "ties":
        logits = logits.mul(2).round().div(2)
    if kind == "masked":
        logits.masked_fill_(torch.rand(logits.shape, generator=generator) < 0.9, -torch.inf)
        logits[:, 7] = 0.0  # a tile of nothing but -inf comes before and behind
        logits[0, torch.arange(VOCAB) != 7] = -torch.inf  # one id left
    return logits


def tiles(logits: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    for number, part in enumerate(logits.split(TILE, dim=1)):
        yield number, number * TILE, part.clone()


def vocabulary(size: int = VOCAB) -> Vocabulary:
    nothing = torch.zeros(size, 1)
    return Vocabulary(output=nothing, embedding=nothing, size=size, softcap=None)


SEEDS, KINDS = range(8), ("plain", "ties", "masked")


@for_each(seed=SEEDS, kind=KINDS)
def test_the_limit_of_a_row_keeps_what_truncation_keeps(seed: int, kind: str) -> None:
    logits, asked = random_logits(seed, kind), random_cut(seed)
    temperature = torch.linspace(0.3, 1.2, ROWS)
    scaled = logits / temperature[:, None]
    kept = truncate(scaled, asked, torch.arange(ROWS)) > -torch.inf
    limit = cut.limits(lambda: tiles(logits), logits.amax(dim=1), temperature, asked, vocabulary())
    assert torch.equal((scaled >= limit[:, None]) & (scaled > -torch.inf), kept)


@for_each(listed=[1, 5, 60, VOCAB], seed=SEEDS, kind=KINDS)
def test_a_list_that_says_it_is_complete_is(
    seed: int, kind: str, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut, "LISTED", listed)
    logits, asked = random_logits(seed, kind), random_cut(seed)
    temperature = torch.linspace(0.3, 1.2, ROWS)
    kept = truncate(logits / temperature[:, None], asked, torch.arange(ROWS)) > -torch.inf
    found = cut.survivors(tiles(logits), temperature, asked, vocabulary())
    for row in found.complete.nonzero()[:, 0].tolist():
        stays = found.values[row] / temperature[row] >= found.limit[row]
        stays &= found.values[row] > -torch.inf
        assert sorted(found.ids[row, stays].tolist()) == kept[row].nonzero()[:, 0].tolist()
    if listed == VOCAB:
        assert bool(found.complete.all())
    # What is known to fit is found: top_k alone, and a set that ends before the list does.
    alone = (asked.top_k < listed) & (asked.min_p == 0) & (asked.top_p == 1)
    untied = (kept.sum(dim=1) < listed) & alone
    assert bool(found.complete[untied].all())


@pytest.mark.parametrize(("min_p", "top_k"), [(0.0, 100), (0.1, VOCAB), (0.1, 100)])
def test_top_p_is_of_what_the_others_leave_though_the_list_ends_before(
    min_p: float, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cut, "LISTED", 60)
    logits = torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    asked = Truncation(
        min_p=torch.full((ROWS,), min_p),
        top_k=torch.full((ROWS,), top_k),
        top_p=torch.full((ROWS,), 0.3),
        sorts=True,
    )
    kept = (truncate(logits, asked, torch.arange(ROWS)) > -torch.inf).sum(dim=1)
    assert int(kept.max()) < 60, "the nucleus is listed; what it is a share of is not"
    found = cut.survivors(tiles(logits), torch.ones(ROWS), asked, vocabulary())
    stays = (found.values >= found.limit[:, None]).sum(dim=1)
    assert torch.equal(stays[found.complete], kept[found.complete])
    limit = cut.limits(
        lambda: tiles(logits), logits.amax(dim=1), torch.ones(ROWS), asked, vocabulary()
    )
    assert torch.equal((logits >= limit[:, None]).sum(dim=1), kept)


def test_numbers_sort_as_their_keys_do() -> None:
    numbers = torch.tensor(
        [-torch.inf, -3e38, -1.5, -1e-40, 0.0, 1e-45, 1e-30, 1.0, 1.0000001, 3e38, torch.inf]
    )
    rank = cut._rank(numbers)
    assert torch.equal(rank, rank.sort(descending=True).values)
    assert len(rank.unique()) == len(numbers)
    assert int(rank.min()) >= 0
    assert int(rank.max()) < 1 << 32
    assert torch.equal(cut._number(rank), numbers)


# ---- in the head ----


def cut_case(seed: int, *, ties: bool = False, rewrite: bool = True, vocab: int = 700) -> Case:
    """Canvases of one row each, so that every row is cut in its own way."""
    case = make_case(seed, canvases=40, length=1, vocab=vocab, rewrite=rewrite)
    if ties:
        case = replace(
            case, hidden=case.hidden.round(), embedding=case.embedding.mul(2).round().div(2)
        )
    asked = case.rewrite or Rewrite(canvas=torch.arange(40))
    truncation = random_cut(seed, rows=40, vocab=vocab)
    return replace(case, rewrite=replace(asked, truncation=truncation))


@for_each(seed=range(4), ties=[False, True], listed=[4, 64, 512])
def test_rows_are_cut_as_the_reference_cuts_them(
    seed: int, ties: bool, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    monkeypatch.setattr(cut, "LISTED", listed)
    case = cut_case(seed, ties=ties)
    truth, plain = case.truth(), case.reference()(case.rows())
    ours = case.streaming()(case.rows())
    assert_same_tokens(ours, plain if ties else truth)
    assert_no_worse(ours, plain, truth)


@for_each(rows_at_once=[1, 7], listed=[4, 512])
def test_a_small_budget_changes_nothing(
    rows_at_once: int, listed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    monkeypatch.setattr(cut, "LISTED", listed)
    case = cut_case(9, rewrite=False)
    budget = rows_at_once * cut.TABLE_BYTES
    assert_same_tokens(case.streaming(budget)(case.rows()), case.truth())


def test_the_id_on_the_limit_stays_where_products_round_by_their_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    monkeypatch.setattr(cut, "LISTED", 1)
    original = logit_tiles.tiles

    def rounded(vocabulary: Any, hidden: Tensor, *rest: Any, **options: Any) -> Any:
        for number, first, logits in original(vocabulary, hidden, *rest, **options):
            yield number, first, logits - 1e-5 * len(hidden)

    monkeypatch.setattr(logit_tiles, "tiles", rounded)
    two = Truncation(
        min_p=torch.zeros(40), top_k=torch.full((40,), 2), top_p=torch.ones(40), sorts=True
    )
    case = cut_case(9, rewrite=False)
    case = replace(case, rewrite=replace(case.rewrite, truncation=two))
    ours = case.streaming(4 * cut.TABLE_BYTES)(case.rows())
    assert bool((ours.entropy > 0).all()), "one of two ids was lost"


@for_each(listed=[4, 512])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_cut_at_one_limit(ranks: int, listed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    monkeypatch.setattr(cut, "LISTED", listed)
    for seed in range(3):
        case = cut_case(seed, vocab=512)
        truth, plain = case.truth(), case.reference()(case.rows())
        for ours in over_ranks(case, ranks, lambda head, case=case: head(case.rows())):
            assert_same_tokens(ours, truth)
            assert_no_worse(ours, plain, truth)


def test_a_row_of_nan_does_not_end_the_process() -> None:
    case = cut_case(0, rewrite=False)
    hidden = case.hidden.clone()
    hidden[3] = torch.nan
    ours = case.streaming()(case.rows(hidden=hidden))
    assert 0 <= int(ours.sample[3]) < 700
    others = torch.arange(len(hidden)) != 3
    assert torch.equal(ours.sample[others], case.truth().sample[others])


def test_no_row_takes_the_head_that_holds_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "LISTED", 4)
    case = cut_case(1)

    def refused(_: Tensor) -> Tensor:
        raise AssertionError("[R, vocab]")

    whole = ReferenceHead(logits=refused, soft_embedding=refused, max_rows=1)
    head = StreamingHead(vocabulary=case.vocabulary(), whole=whole, budget=1 << 28)
    assert_same_tokens(head(case.rows()), case.truth())


def test_rows_that_keep_few_ids_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cut_case(2, rewrite=False)
    read = counted_readings(monkeypatch)
    few = Truncation(
        min_p=torch.zeros(40), top_k=torch.full((40,), 20), top_p=torch.ones(40), sorts=True
    )
    rewrite = replace(case.rewrite, truncation=few)
    ours = case.streaming()(replace(case, rewrite=rewrite).rows())
    assert read == [40]
    assert_same_tokens(ours, replace(case, rewrite=rewrite).truth())
    assert few.take(torch.tensor([3])).top_k.tolist() == [20]
