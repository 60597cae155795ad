"""The streaming head draws what the materialising head draws, and is as exact."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.cases import for_each
from helpers.heads import (
    Case,
    assert_no_worse,
    assert_same_shape,
    assert_same_tokens,
    counted_readings,
    make_case,
    over_ranks,
)

from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.head import kinds, logit_tiles, sample
from vllm_diffusion.head.reference import ReferenceHead

TILES = [16, 128, sample.TILE]


@pytest.fixture(params=TILES)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Many tiles of few ids, some of many, and one that is wider than the vocabulary."""
    monkeypatch.setattr(sample, "TILE", request.param)
    return int(request.param)


def check(case: Case, factor: float = 2.0) -> None:
    truth, plain = case.truth(), case.reference()(case.rows())
    ours = case.streaming()(case.rows())
    assert_same_shape(ours, plain)
    assert_same_tokens(ours, truth)
    assert_no_worse(ours, plain, truth, factor)


@pytest.mark.usefixtures("tile")
@for_each(seed=range(3), softcap=[30.0, None])
def test_it_is_the_definition(seed: int, softcap: float | None) -> None:
    check(make_case(seed, softcap=softcap))


@pytest.mark.usefixtures("tile")
@for_each(vocab=[1, 2, 63, 65, 128])
def test_vocabularies_that_fill_no_tile(vocab: int) -> None:
    check(make_case(4, vocab=vocab))


def test_the_real_tile_over_several_tiles() -> None:
    check(make_case(5, vocab=3 * sample.TILE + 17, hidden=16))


@pytest.mark.usefixtures("tile")
@for_each(seed=range(6))
def test_every_rewrite_at_once(seed: int) -> None:
    check(make_case(seed, rewrite=True))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(
    "part", ["greedy", "allowed", "bias", "penalties", "forbidden", "pinned", "truncation"]
)
@for_each(limit=[0, 4096])
def test_every_rewrite_alone(part: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With no list short enough, the rows with lists are streamed under a mask.
    monkeypatch.setattr(kinds, "LISTED_AT_MOST", limit)
    case = make_case(20, rewrite=True)
    assert case.rewrite is not None
    only = Rewrite(canvas=case.rewrite.canvas, **{part: getattr(case.rewrite, part)})
    check(replace(case, rewrite=only))


def test_a_temperature_and_greedy_tokens_cost_no_row_a_rewrite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case(20, rewrite=True)
    assert case.rewrite is not None
    greedy = Rewrite(
        canvas=case.rewrite.canvas,
        greedy=case.rewrite.greedy,
        temperature=torch.ones(int(case.rewrite.canvas.max()) + 1),
    )
    asked = replace(case, rewrite=greedy)
    truth = asked.truth()
    monkeypatch.setattr(logit_tiles, "TiledRewrite", None)
    ours = asked.streaming()(asked.rows())
    assert_same_tokens(ours, truth)
    free = replace(case, rewrite=None)
    plain = free.streaming()(free.rows())
    assert torch.equal(ours.entropy, plain.entropy), "asking for a temperature changes a bit"
    warm = replace(case, rewrite=replace(greedy, greedy=None))
    classes = {"class_of": torch.arange(len(case.embedding)).int() % 7, "num_classes": 7}
    _, by_class = warm.streaming().by_class(warm.rows(), **classes)
    _, same = free.streaming().by_class(free.rows(), **classes)
    assert torch.equal(by_class.log_mass, same.log_mass)


def test_what_neighbours_ask_changes_no_bit_of_a_row() -> None:
    case = make_case(21, canvases=6, rewrite=True)
    rewrite, rows = case.rewrite, len(case.hidden)
    assert rewrite is not None
    assert rewrite.bias is not None
    assert rewrite.penalties is not None
    assert rewrite.truncation is not None
    # Every second canvas asks for nothing.
    quiet, cost, limit = slice(0, None, 2), rewrite.penalties, rewrite.truncation
    for tensor, nothing in (
        (rewrite.allowed, -1),
        (rewrite.bias[1], 0),
        (cost.scale, 1),
        (cost.offset, 0),
        (limit.min_p, 0),
        (limit.top_k, len(case.embedding)),
        (limit.top_p, 1),
    ):
        tensor[quiet] = nothing
    here = (rewrite.canvas % 2 == 0).nonzero()[:, 0]
    rewrite.forbidden[here] = -1
    rewrite.pinned[here] = -1
    crowd = replace(case, rewrite=replace(rewrite, greedy=None))
    alone = replace(
        case,
        hidden=case.hidden[here],
        temperature=case.temperature[here],
        noise=case.noise.take(here),
        rewrite=None,
    )
    assert 0 < len(here) < rows
    found, expected = crowd.streaming()(crowd.rows()), alone.streaming()(alone.rows())
    for name in ("argmax", "sample", "entropy", "margin", "soft_embedding"):
        assert torch.equal(getattr(found, name)[here], getattr(expected, name)), name
    classes = {"class_of": torch.arange(len(case.embedding)).int() % 7, "num_classes": 7}
    _, found = crowd.streaming().by_class(crowd.rows(), **classes)
    _, expected = alone.streaming().by_class(alone.rows(), **classes)
    assert torch.equal(found.log_mass[here], expected.log_mass)
    assert torch.equal(found.sample[here], expected.sample)


@pytest.mark.usefixtures("tile")
@for_each(seed=range(3))
def test_masks_in_the_stream(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "LISTED_AT_MOST", 0)
    case = make_case(seed, rewrite=True)
    assert case.rewrite is not None
    check(replace(case, rewrite=replace(case.rewrite, truncation=None, pinned=None)))


@pytest.mark.usefixtures("tile")
def test_a_row_whose_every_id_is_forbidden_may_say_them() -> None:
    case = make_case(1, vocab=9)
    rows = len(case.hidden)
    forbidden = torch.arange(9).expand(rows, 9).clone()
    forbidden[::2, 4] = -1  # every other row has one id left
    canvas = torch.arange(rows) // 8
    case = replace(case, rewrite=Rewrite(canvas=canvas, forbidden=forbidden))
    check(case)
    assert bool((case.streaming()(case.rows()).argmax[::2] == 4).all())


@pytest.mark.usefixtures("tile")
@for_each(seed=range(3))
def test_bf16_products(seed: int) -> None:
    case = make_case(seed, dtype=torch.bfloat16)
    # The products round to bf16 alike, so the truth to compare with is of those logits.
    logits = case.reference().logits(case.hidden)
    exact = ReferenceHead(
        logits=lambda _: logits.double(),
        soft_embedding=lambda prob: prob @ case.embedding.double() * 5.65,
        max_rows=1000,
    )
    truth, plain = exact(case.rows()), case.reference()(case.rows())
    ours = case.streaming()(case.rows())
    assert_same_shape(ours, plain)
    assert_same_tokens(ours, truth)
    assert_no_worse(ours, plain, truth)


@for_each(at_once=[1, 3, 16])
def test_row_chunks_equal_the_whole(at_once: int) -> None:
    case = make_case(2, rewrite=True)
    budget = at_once * logit_tiles.TILE_COPIES * 4 * sample.TILE
    assert_same_tokens(case.streaming(budget)(case.rows()), case.truth())


# ---- what fp32 bears ----


@pytest.mark.usefixtures("tile")
@for_each(temperature=[4e-3, 0.4, 1e3], softcap=[1.0, 30.0, None])
def test_any_temperature_and_softcap_are_safe(
    temperature: float,
    softcap: float | None,
) -> None:
    case = make_case(3, softcap=softcap)
    # Beyond the softcap's reach tanh is 1 in fp32 and many ids are equally good.
    hidden = case.hidden * min(1.0, (softcap or 30.0) / 30.0)
    even = torch.full_like(case.temperature, temperature)
    case = replace(case, hidden=hidden, temperature=even)
    truth, plain = case.truth(), case.reference()(case.rows())
    ours = case.streaming()(case.rows())
    assert torch.equal(ours.argmax, truth.argmax)
    assert_no_worse(ours, plain, truth)


@pytest.mark.usefixtures("tile")
def test_logits_far_below_the_softcap_keep_their_weight() -> None:
    # exp((x - c) / T) would be 0 for every id: (c - x) / T is 150.
    case = make_case(0)
    low = replace(
        case,
        hidden=torch.full_like(case.hidden, 1.0),
        embedding=-case.embedding.abs() * 5,
        temperature=torch.full_like(case.temperature, 0.4),
    )
    assert float(low.reference().logits(low.hidden).max()) < -29
    check(low)


@pytest.mark.usefixtures("tile")
def test_a_row_of_nan_does_not_end_the_process() -> None:
    case = make_case(0)
    hidden = case.hidden.clone()
    hidden[3] = math.nan
    ours = case.streaming()(case.rows(hidden=hidden))
    assert 0 <= int(ours.sample[3]) < 700
    others = torch.arange(len(hidden)) != 3
    assert torch.equal(ours.sample[others], case.truth().sample[others])


# ---- what is not computed ----


def test_rows_with_short_lists_and_pins_are_not_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = counted_readings(monkeypatch)
    case = make_case(1, canvases=4)
    allowed = torch.tensor([[-1, -1], [3, 5], [-1, -1], [2, -1]])
    pinned = torch.full((32,), -1)
    pinned[1] = pinned[9] = 4
    rewrite = Rewrite(canvas=torch.arange(4).repeat_interleave(8), allowed=allowed, pinned=pinned)
    ours = case.streaming()(replace(case, rewrite=rewrite).rows())
    assert read == [15]
    assert_same_tokens(ours, replace(case, rewrite=rewrite).truth())


# ---- candidates and scores ----


@pytest.mark.usefixtures("tile")
@for_each(count=[1, 4, 1000])
def test_candidates_are_those_of_the_reference(count: int) -> None:
    case = make_case(6, rewrite=True)
    assert case.rewrite is not None
    ours = case.streaming().candidates(case.rows(), count)
    theirs = case.reference(torch.float64).candidates(case.rows(), count)
    assert torch.equal(ours >= 0, theirs >= 0)
    assert ours.shape == theirs.shape
    if count < 1000:  # beyond that, near ties may stand in either order
        assert torch.equal(ours, theirs)


HOW = [
    {"count": 5},
    {"count": 0},
    {"count": -1},
    {"count": 3, "raw_logits": True},
    {"count": 3, "ids": (3, 600, 40)},
    {"count": 3, "ids": (3, 600, 40), "among": True},
    {"count": 3, "ids": (3, 600, 40), "raw_logits": True},
]


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("how", HOW, ids=str)
@for_each(budget=[1, 1 << 28])
def test_scores_are_those_of_the_reference(how: dict, budget: int) -> None:
    case = make_case(7)
    tokens = torch.tensor((3, 600, 40))[torch.arange(len(case.hidden)) % 3]
    ours = case.streaming(budget).scores(case.hidden, tokens, **how)
    plain = case.reference().scores(case.hidden, tokens, **how)
    truth = case.reference(torch.float64).scores(case.hidden, tokens, **how)
    if how["count"] >= 0:
        assert torch.equal(ours.ids, truth.ids)
        assert torch.equal(ours.ranks, truth.ranks)
    error = (ours.values.double() - truth.values.double()).abs().max()
    allowed = (plain.values.double() - truth.values.double()).abs().max()
    assert float(error) <= 2 * float(allowed) + 1e-6
    assert ours.values.dtype == plain.values.dtype


# ---- ranks ----


@for_each(rewrite=[False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_a_part_of_the_vocabulary_agree_with_one(
    ranks: int, rewrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    for seed in range(4):
        case = make_case(seed, vocab=512, rewrite=rewrite)
        truth, plain = case.truth(), case.reference()(case.rows())
        for ours in over_ranks(case, ranks, lambda head, case=case: head(case.rows())):
            assert_same_tokens(ours, truth)
            assert_no_worse(ours, plain, truth)


def test_ranks_agree_on_candidates_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    case = make_case(8, vocab=512, rewrite=True)
    tokens = torch.arange(len(case.hidden)) * 11 % 512
    truth = case.reference(torch.float64)
    for best in over_ranks(case, 2, lambda head: head.candidates(case.rows(), 4)):
        assert torch.equal(best, truth.candidates(case.rows(), 4))
    for how in HOW:
        if how["count"] < 0:
            continue
        chosen = {**how, "ids": (3, 300, 40)} if "ids" in how else how
        expected = truth.scores(case.hidden, tokens, **chosen)
        for ours in over_ranks(
            case, 2, lambda head, how=chosen: head.scores(case.hidden, tokens, **how)
        ):
            assert torch.equal(ours.ids, expected.ids)
            assert torch.equal(ours.ranks, expected.ranks)
            torch.testing.assert_close(ours.values.double(), expected.values, atol=1e-4, rtol=1e-5)
