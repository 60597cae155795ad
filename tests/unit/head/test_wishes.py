"""Rows whose way the host knows from their requests, as on a GPU, against rows looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from helpers.cases import for_each
from helpers.heads import Case, assert_no_worse, assert_same_tokens, make_case

from vllm_diffusion.constrain.dense import DenseRewrite
from vllm_diffusion.constrain.rewrite import Rewrite, Wish
from vllm_diffusion.constrain.window import TiledRewrite
from vllm_diffusion.head import kinds, sample
from vllm_diffusion.head.cut_rows import CutRows
from vllm_diffusion.head.rows import Rows

if TYPE_CHECKING:
    import pytest


def wishes_of(case: Case) -> tuple[Wish, ...]:
    rewrite = case.rewrite
    assert rewrite is not None
    assert rewrite.truncation is not None
    assert rewrite.allowed is not None
    cuts = kinds.cuts(rewrite.truncation, len(case.embedding)).tolist()
    lists = [torch.unique(ids[ids >= 0]) for ids in rewrite.allowed]
    return tuple(
        Wish(moves=True, cuts=cut, allowed=ids if len(ids) else None)
        for cut, ids in zip(cuts, lists, strict=True)
    )


@for_each(seed=range(6))
def test_rows_by_wishes_are_the_rows_of_the_reference(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    case = make_case(seed, rewrite=True)
    assert case.rewrite is not None
    truth, plain = case.truth(), case.reference()(case.rows())
    known = replace(case, rewrite=replace(case.rewrite, wishes=wishes_of(case)))
    ours = known.streaming()(known.rows())
    assert_same_tokens(ours, truth)
    assert_no_worse(ours, plain, truth)


def test_canvases_that_all_ask_for_the_same_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    case = make_case(1, rewrite=True)
    assert case.rewrite is not None
    rewrite = Rewrite(canvas=case.rewrite.canvas, pinned=case.rewrite.pinned)
    nothing = (Wish(moves=False, cuts=False, allowed=None),) * 5
    free = replace(case, rewrite=rewrite)
    known = replace(case, rewrite=replace(rewrite, wishes=nothing))
    ours, seen = known.streaming()(known.rows()), free.streaming()(free.rows())
    assert_same_tokens(ours, seen)
    assert_no_worse(ours, free.reference()(free.rows()), free.truth())


@for_each(seed=range(4), pins=[False, True])
def test_tables_say_what_lists_say(seed: int, pins: bool) -> None:
    case, vocab, tile = make_case(seed, vocab=700, rewrite=True), 700, 64
    rewrite = case.rewrite
    assert rewrite is not None
    rewrite = rewrite if pins else replace(rewrite, pinned=None)
    edges = [*range(0, vocab, tile), vocab]
    lists, tables = TiledRewrite(rewrite, torch.tensor(edges), vocab), DenseRewrite(rewrite, vocab)
    logits = torch.randn(len(case.hidden), vocab, generator=torch.Generator().manual_seed(seed))
    for number, start in enumerate(edges[:-1]):
        some = logits[:, start : start + tile]
        kept = some.clone()
        expected = lists.apply(some.clone(), number, start)
        torch.testing.assert_close(tables.apply(some, number, start), expected)
        assert torch.equal(some, kept)


@for_each(seed=range(3))
def test_rows_that_are_cut_are_looked_at_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    monkeypatch.setattr("vllm_diffusion.head.cut.LISTED", 32)
    case = make_case(seed, rewrite=True)
    assert case.rewrite is not None
    rewrite = Rewrite(canvas=case.rewrite.canvas, truncation=case.rewrite.truncation)
    rows = Rows(hidden=case.hidden, temperature=case.temperature, noise=case.noise, rewrite=rewrite)
    cuts = CutRows(case.vocabulary(), 1 << 28)
    one, other = cuts._statistics_on_device(rows), cuts.statistics(rows)
    assert_same_tokens(one, other)
    torch.testing.assert_close(one.entropy, other.entropy)
    torch.testing.assert_close(one.soft_embedding, other.soft_embedding)
