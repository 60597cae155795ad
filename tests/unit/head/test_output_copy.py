"""Tiles of a copy in fewer bits, and the exact logits of the best ids of a row in them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from helpers.classes import classes_of
from helpers.heads import Case, assert_same_tokens, make_case, over_ranks

from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.head import logit_tiles, native, native_rescoring
from vllm_diffusion.head.native_rescoring import MOST
from vllm_diffusion.head.output_copy import HEAD_FORMS, QuantisedOutput
from vllm_diffusion.head.rescoring import Rescoring
from vllm_diffusion.head.sample import TILE

if TYPE_CHECKING:
    from vllm_diffusion.head.stream import StreamingHead

built = native.library()
VOCAB = 2 * TILE + 99


@pytest.fixture(params=["torch", *native.ISAS])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rescoring in torch, or in C++ on one instruction set."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
        return
    if built is None:
        pytest.skip("the C++ part of the head is not built")
    number, rescore = native.ISAS.index(request.param), native_rescoring.rescore
    if number > built.vd_best_isa():
        pytest.skip(f"this processor has no {request.param}")

    def on_this(*arguments, **options):
        rescore(*arguments, **options, isa=number)

    monkeypatch.setattr(native_rescoring, "rescore", on_this)


def quantised(case: Case, form: str = "int8", rescored: int = 16) -> StreamingHead:
    copy = QuantisedOutput(case.embedding, form, rescored=rescored)
    return replace(case.streaming(), vocabulary=replace(case.vocabulary(), copy=copy))


def logits_of(head: StreamingHead, case: Case, rewrite: Rewrite | None = None) -> torch.Tensor:
    tiles = logit_tiles.tiles(head.vocabulary, case.hidden, rewrite)
    return torch.cat([logits.clone() for _, _, logits in tiles], dim=1)


# ---- which ids are exact ----


@pytest.mark.usefixtures("implementation")
@for_each(count=[1, 5, MOST], hidden=[16, 33, 128], dtype=[torch.float32, torch.bfloat16])
def test_the_best_ids_are_exact_and_the_others_as_they_were(count, hidden, dtype):
    case = make_case(1, vocab=VOCAB, hidden=hidden, dtype=dtype, canvases=2, length=4)
    vocabulary = case.vocabulary()
    exact = vocabulary.capped(case.hidden.float() @ case.embedding.float().T)
    generator = torch.Generator().manual_seed(0)
    # In steps, so that many are equal.
    rough = exact + torch.randn(exact.shape, generator=generator)
    rough = (rough * 8).round() / 8
    rough[2] = torch.nan
    rescoring = Rescoring(vocabulary, case.hidden, count)
    seen = rough.clone()
    for first in vocabulary.tiles():
        tile = seen[:, first : first + TILE]
        rescoring.rescore(tile, tile, first, cap=True)
    expected = torch.stack([mended(*rows, count) for rows in zip(rough, exact, strict=True)])
    assert torch.equal(seen.isnan(), rough.isnan())
    changed = seen.nan_to_num() != rough.nan_to_num()
    assert torch.equal(changed, expected.nan_to_num() != rough.nan_to_num())
    assert torch.allclose(seen, expected, atol=1e-4, equal_nan=True)
    assert changed[[0, 1, 3, 4]].sum(dim=1).ge(count).all()


def mended(rough: torch.Tensor, exact: torch.Tensor, count: int) -> torch.Tensor:
    """A row with the exact logits of what was among its best when its tile came."""
    found, best = rough.clone(), rough.new_full((count,), -torch.inf)
    for start in range(0, len(rough), TILE):
        tile = rough[start : start + TILE]
        above = tile[tile > best.min()]
        enough = above.sort(descending=True).values[:count]
        enters = (tile > best.min()) & (tile >= enough[-1:].sum())
        found[start : start + TILE] = torch.where(enters, exact[start : start + TILE], tile)
        best = torch.cat([best, enough]).sort(descending=True).values[:count]
    return found


@pytest.mark.usefixtures("implementation")
def test_ids_are_ranked_as_what_they_become():
    case = make_case(2, vocab=700, canvases=1, length=3)
    wanted = torch.tensor([[5, 6]])
    rewrite = Rewrite(
        canvas=torch.zeros(3, dtype=torch.int64), bias=(wanted, torch.full((1, 2), 100.0))
    )
    exact = logits_of(case.streaming(), case, rewrite)
    biased = logits_of(quantised(case, rescored=2), case, rewrite)
    assert torch.allclose(biased[:, wanted[0]], exact[:, wanted[0]], atol=1e-4)
    others = torch.ones(700, dtype=torch.bool)
    others[wanted] = False
    assert (biased[:, others] != exact[:, others]).float().mean() > 0.9


@pytest.mark.usefixtures("implementation")
def test_what_is_forbidden_takes_no_place_among_the_best():
    case = make_case(2, vocab=TILE + 50, canvases=1, length=2)
    exact = logits_of(case.streaming(), case)
    best = exact.topk(20, dim=1).indices
    rewrite = Rewrite(canvas=torch.zeros(2, dtype=torch.int64), forbidden=best)
    seen = logits_of(quantised(case, rescored=4), case, rewrite)
    assert (seen.gather(1, best) == -torch.inf).all()
    left = exact.scatter(1, best, -torch.inf)
    heads = left.argmax(dim=1, keepdim=True)
    assert torch.allclose(seen.gather(1, heads), left.gather(1, heads), atol=1e-4)


# ---- statistics ----


@pytest.mark.parametrize("form", HEAD_FORMS)
@for_each(rewritten=[False, True])
def test_a_head_that_scores_every_id_exactly_is_the_exact_one(form, rewritten):
    case = make_case(3, vocab=MOST, hidden=32, rewrite=rewritten)
    own, exact = (head(case.rows()) for head in (quantised(case, form, MOST), case.streaming()))
    assert_same_tokens(own, exact)
    for name in ("entropy", "top_prob", "margin", "soft_embedding"):
        assert torch.allclose(getattr(own, name), getattr(exact, name), atol=1e-4), name


@pytest.mark.parametrize("form", HEAD_FORMS)
def test_rescoring_takes_most_of_the_error(form):
    case = make_case(4, vocab=VOCAB, hidden=64, canvases=4, length=16)
    truth = case.truth()

    def error(count: int) -> float:
        stats = quantised(case, form, count)(case.rows())
        return float((stats.entropy - truth.entropy).abs().mean())

    exact = float((case.streaming()(case.rows()).entropy - truth.entropy).abs().mean())
    assert exact < error(16) < 0.5 * error(0)


@pytest.mark.parametrize("form", HEAD_FORMS)
def test_a_row_gives_the_same_in_any_batch(form):
    case = make_case(5, vocab=VOCAB, canvases=3, length=4)
    together = quantised(case, form)(case.rows())
    for row in range(len(case.hidden)):
        alone = quantised(case, form)(case.rows().take(slice(row, row + 1)))
        assert alone.argmax == together.argmax[row]
        assert alone.sample == together.sample[row]
        assert torch.allclose(alone.entropy, together.entropy[row], rtol=1e-5, atol=1e-6)


def test_cuts_and_classes_read_the_copy_too():
    case = make_case(6, vocab=VOCAB, rewrite=True)
    class_of = classes_of(VOCAB, 6)
    count = int(class_of.max()) + 1
    for form in ("int8", "fp8"):
        head = quantised(case, form)
        stats, classes = head.by_class(case.rows(), class_of=class_of, num_classes=count)
        plain = head(case.rows())
        assert torch.equal(stats.argmax, plain.argmax)
        exact = case.streaming().by_class(case.rows(), class_of=class_of, num_classes=count)[1]
        named = exact.best >= 0
        assert torch.equal(named, classes.best >= 0)
        off = (classes.log_mass - exact.log_mass)[named & torch.isfinite(exact.log_mass)]
        assert 0 < off.abs().mean() < 0.2


def test_scores_that_users_are_told_are_those_of_the_matrix():
    case = make_case(7, vocab=700)
    tokens = torch.arange(len(case.hidden))
    own, exact = (
        head.scores(case.hidden, tokens, count=3) for head in (quantised(case), case.streaming())
    )
    assert torch.equal(own.ids, exact.ids)
    assert torch.equal(own.values, exact.values)


def test_a_changed_matrix_is_copied_again():
    case = make_case(8, vocab=700)
    head = quantised(case)
    before = head(case.rows())
    case.embedding.copy_(case.embedding.flip(0))
    after = head(case.rows())
    fresh = quantised(case)(case.rows())
    assert torch.equal(after.argmax, fresh.argmax)
    assert not torch.equal(after.argmax, before.argmax)


def test_ranks_agree_on_what_one_sees():
    case = make_case(9, vocab=2 * TILE)

    def call(head: StreamingHead):
        vocabulary = head.vocabulary
        copy = QuantisedOutput(vocabulary.output, "int8")
        return replace(head, vocabulary=replace(vocabulary, copy=copy))(case.rows())

    first, second = over_ranks(case, 2, call)
    assert_same_tokens(first, second)
    alone = quantised(case)(case.rows())
    assert torch.equal(first.argmax, alone.argmax)
    assert torch.allclose(first.entropy, alone.entropy, atol=1e-2)


def test_without_the_packed_products_the_definition_runs(monkeypatch):
    case = make_case(10, vocab=700)
    packed = [quantised(case, form)(case.rows()) for form in ("fp8", "nvfp4")]
    monkeypatch.setattr("vllm_diffusion.quant.native.library", lambda: None)
    plain = [quantised(case, form)(case.rows()) for form in ("fp8", "nvfp4")]
    for one, other in zip(packed, plain, strict=True):
        assert_same_tokens(one, other)
        assert torch.allclose(one.entropy, other.entropy, atol=1e-5)
