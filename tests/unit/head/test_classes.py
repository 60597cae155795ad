"""Statistics by class: the reference against brute force, the stream against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.cases import for_each
from helpers.classes import COUNT, NUMBERS, assert_numbers, assert_tokens, both, check, classes_of
from helpers.frequencies import assert_frequencies
from helpers.heads import assert_same_tokens, counted_readings, make_case, over_ranks, pairs_of

from vllm_diffusion.constrain.logits import LENIENCE, rewrite_logits
from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.head import kinds, logit_tiles, native, sample, stream


@pytest.fixture(params=[16, 128, sample.TILE])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Many tiles of few ids, some of many, and one that is wider than the vocabulary."""
    monkeypatch.setattr(sample, "TILE", request.param)
    return int(request.param)


# ---- the definition ----


def test_the_reference_is_what_its_words_say() -> None:
    case = make_case(0, canvases=2, length=3, vocab=40)
    class_of = classes_of(40)
    _, found = both(case, case.reference(torch.float64), class_of)
    logits = case.reference(torch.float64).logits(case.hidden)
    prob = (logits / case.temperature[:, None]).softmax(dim=-1)
    for row in range(len(prob)):
        for number in range(COUNT):
            ids = [t for t in range(40) if class_of[t] == number != 0]
            mass = float(prob[row, ids].sum())
            assert float(found.log_mass[row, number].exp()) == pytest.approx(mass)
            if not ids:
                assert found.best[row, number] == found.sample[row, number] == -1
                assert found.best_log_prob[row, number] == -math.inf
                assert found.entropy[row, number] == 0
                continue
            inside = prob[row, ids] / mass
            ranked = sorted(ids, key=lambda t: -float(prob[row, t]))
            entropy = -float((inside * inside.log()).sum())
            assert float(found.entropy[row, number]) == pytest.approx(entropy, abs=1e-12)
            assert found.best[row, number] == ranked[0]
            assert found.sample[row, number] in ids
            best = float(prob[row, ranked[0]].log())
            assert float(found.best_log_prob[row, number]) == pytest.approx(best)
            second = float(prob[row, ranked[1]].log()) if len(ids) > 1 else -math.inf
            assert float(found.second_log_prob[row, number]) == pytest.approx(second)


def test_a_forbidden_id_costs_so_many_nats() -> None:
    case = make_case(3, canvases=2, length=2, vocab=30, rewrite=True)
    assert case.rewrite is not None
    bias, cost = case.rewrite.bias, case.rewrite.penalties
    canvas = torch.tensor([0, 0, 1, 1])
    rewrite = Rewrite(
        canvas=canvas,
        bias=bias,
        penalties=cost,
        allowed=torch.tensor([[1, 2, 3, 7], [-1, -1, -1, -1]]),
        forbidden=torch.tensor([[-1], [7], [7], [-1]]),
        pinned=torch.tensor([-1, -1, -1, 5]),
    )
    case = replace(case, rewrite=rewrite)
    alone = torch.arange(31).int()[1:]  # every id is a class of its own
    _, found = both(case, case.reference(torch.float64), alone, 31)
    logits = case.reference(torch.float64).logits(case.hidden)
    logits = rewrite_logits(logits, Rewrite(canvas=canvas, bias=bias, penalties=cost))
    scaled = logits / case.temperature[:, None]
    out = torch.zeros_like(scaled, dtype=torch.bool)
    out[:2] = True
    out[:2, [1, 2, 3, 7]] = False
    out[1:3, 7] = True
    expected = (scaled - LENIENCE * out).log_softmax(dim=-1)
    expected[3] = torch.full((30,), -torch.inf).index_fill(0, torch.tensor(5), 0.0)
    torch.testing.assert_close(found.log_mass[:, 1:], expected)
    assert found.best[3].tolist() == [-1, *(5 if t == 5 else -1 for t in range(30))]


# ---- the stream ----


@pytest.mark.usefixtures("tile")
@for_each(seed=range(3), softcap=[30.0, None])
def test_the_stream_is_the_definition(seed: int, softcap: float | None) -> None:
    check(make_case(seed, softcap=softcap), classes_of(700, seed))


@pytest.mark.usefixtures("tile")
@for_each(vocab=[1, 2, 63, 65, 128])
def test_vocabularies_that_fill_no_tile(vocab: int) -> None:
    check(make_case(4, vocab=vocab), classes_of(vocab, 4))


@for_each(count=[2, 40, 3000])
def test_the_real_tile_over_several_tiles(count: int) -> None:
    vocab = 2 * sample.TILE + 17
    case = make_case(5, vocab=vocab, hidden=16, canvases=3, length=4)
    generator = torch.Generator().manual_seed(count)
    class_of = torch.randint(count, (vocab,), generator=generator, dtype=torch.int32)
    check(case, class_of, count)


def test_one_class_of_everything_is_the_row() -> None:
    case = make_case(6, vocab=sample.TILE + 9)
    everything = torch.ones(sample.TILE + 9, dtype=torch.int32)
    stats, ours = both(case, case.streaming(), everything, 2)
    torch.testing.assert_close(ours.log_mass[:, 1], torch.zeros(40), atol=2e-6, rtol=0)
    torch.testing.assert_close(ours.entropy[:, 1], stats.entropy, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(ours.best_log_prob[:, 1].exp(), stats.top_prob)
    assert torch.equal(ours.best[:, 1], stats.argmax)


@pytest.mark.usefixtures("tile")
@for_each(size=[1e2, 1e4], temperature=[0.4, 0.8])
def test_a_class_far_below_the_best_is_measured_as_exactly(size: float, temperature: float) -> None:
    case = make_case(7, softcap=None)
    case = replace(
        case,
        hidden=case.hidden / case.hidden.norm(dim=1, keepdim=True) * size / 16,
        temperature=torch.full_like(case.temperature, temperature),
    )
    assert float(case.reference().logits(case.hidden).abs().max()) > size / 10
    # Products of this size round by more than a temperature: the truth is of the same logits.
    logits = case.reference().logits(case.hidden)
    exact = replace(case.reference(), logits=lambda _: logits.double())
    class_of = classes_of(700, 7)
    _, truth = both(case, exact, class_of)
    _, plain = both(case, case.reference(), class_of)
    _, ours = both(case, case.streaming(), class_of)
    assert bool(ours.log_mass[:, [1, 2]].isfinite().all())
    assert torch.equal(ours.best, truth.best)
    assert_numbers(ours, plain, truth)


# ---- rewrites ----


@pytest.mark.usefixtures("tile")
@for_each(seed=range(4))
def test_every_rewrite_at_once(seed: int) -> None:
    check(make_case(seed, rewrite=True), classes_of(700, seed))


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(
    "part", ["greedy", "allowed", "bias", "penalties", "forbidden", "pinned", "truncation"]
)
def test_every_rewrite_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "LISTED_AT_MOST", 20)
    case = make_case(20, rewrite=True)
    assert case.rewrite is not None
    only = Rewrite(canvas=case.rewrite.canvas, **{part: getattr(case.rewrite, part)})
    check(replace(case, rewrite=only), classes_of(700, 20))


def test_rows_that_may_say_anything_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = counted_readings(monkeypatch)
    case = make_case(1, canvases=3)
    both(case, case.streaming(), classes_of(700))
    assert read == [24]
    read.clear()
    rewrite = Rewrite(
        canvas=torch.arange(3).repeat_interleave(8),
        forbidden=torch.where(torch.arange(24) == 3, 9, -1)[:, None],
        pinned=torch.where(torch.arange(24) < 2, 9, -1),
    )
    both(replace(case, rewrite=rewrite), case.streaming(), classes_of(700))
    assert sorted(read) == [1, 1, 21]  # once more the row with a mask, pinned rows never


@for_each(at_once=[1, 3], rewrite=[False, True])
def test_row_chunks_equal_the_whole(at_once: int, rewrite: bool) -> None:
    case, class_of = make_case(2, rewrite=rewrite), classes_of(700)
    budget = at_once * (logit_tiles.tile_bytes() + stream.CLASS_BYTES * COUNT)
    _, whole = both(case, case.streaming(), class_of)
    _, chunked = both(case, case.streaming(budget), class_of)
    assert_tokens(chunked, whole)
    for name in NUMBERS:
        # Beside ``LENIENCE`` a logit has four decimals left.
        torch.testing.assert_close(
            getattr(chunked, name), getattr(whole, name), rtol=1e-5, atol=1e-4 if rewrite else 1e-5
        )


# ---- ranks ----


@for_each(rewrite=[False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_with_a_part_of_the_vocabulary_agree_with_one(
    ranks: int, rewrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "TILE", 64)
    for seed in range(3):
        case, class_of = make_case(seed, vocab=512, rewrite=rewrite), classes_of(512, seed)
        class_of[256:][class_of[256:] == 1] = 4  # 1 is a class that some ranks do not hold
        _, truth = both(case, case.reference(torch.float64), class_of)
        _, plain = both(case, case.reference(), class_of)
        for stats, ours in over_ranks(
            case,
            ranks,
            lambda head, case=case, class_of=class_of: both(case, head, class_of),
        ):
            assert_same_tokens(stats, case.truth())
            assert_tokens(ours, truth)
            assert_numbers(ours, plain, truth)


def test_ranks_that_lack_a_class_give_it_no_token_in_a_row_of_nan() -> None:
    case = make_case(0, vocab=512)
    case.hidden[3] = math.nan
    class_of = torch.ones(512, dtype=torch.int32)
    class_of[256:] = 2
    for _, ours in over_ranks(case, 2, lambda head: both(case, head, class_of, 3)):
        assert 0 <= int(ours.best[3, 1]) < 256 <= int(ours.best[3, 2]) < 512
        assert 0 <= int(ours.sample[3, 1]) < 256 <= int(ours.sample[3, 2]) < 512


# ---- the draw ----


@pytest.mark.parametrize(
    ("vocab", "form"), [(30, "torch"), (300, "torch"), (30, "C++"), (sample.TILE + 40, "C++")]
)
def test_frequencies_inside_a_class_are_its_softmax(
    vocab: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    one = make_case(9, canvases=1, length=1, vocab=vocab, hidden=8)
    class_of = (torch.arange(vocab) % 3).int()
    draws = []
    rows = 2000
    for turn in range(6):
        many = replace(
            one,
            hidden=one.hidden.expand(rows, -1) * 0.3,
            temperature=one.temperature.expand(rows),
            noise=replace(
                one.noise,
                seed=one.noise.seed.expand(rows, 2),
                position=torch.arange(rows) + turn * rows,
                step=one.noise.step.expand(rows),
            ),
        )
        draws.append(both(many, many.streaming(), class_of, 3)[1].sample)
    drawn = torch.cat(draws)
    assert bool((drawn[:, 0] == -1).all())
    logits = many.reference(torch.float64).logits(many.hidden[:1])[0]
    for number in (1, 2):
        inside = (logits / one.temperature).masked_fill(class_of != number, -torch.inf)
        assert_frequencies(drawn[:, number], inside.softmax(-1))


def test_the_other_rows_of_a_batch_do_not_matter() -> None:
    case, class_of = make_case(10), classes_of(700)
    _, together = both(case, case.streaming(), class_of)
    for row in (0, 13, 39):
        index = torch.tensor([row])
        alone = replace(
            case,
            hidden=case.hidden[index],
            temperature=case.temperature[index],
            noise=case.noise.take(index),
        )
        _, one = both(alone, alone.streaming(), class_of)
        assert torch.equal(one.sample[0], together.sample[row])
        assert torch.equal(one.best[0], together.best[row])


def test_what_an_id_is_classed_with_does_not_change_its_luck() -> None:
    case = make_case(11)
    _, one = both(case, case.streaming(), torch.ones(700, dtype=torch.int32), 2)
    split = (torch.arange(700) % 2 + 1).int()
    _, two = both(case, case.streaming(), split, 3)
    winner = one.sample[:, 1]
    assert torch.equal(two.sample.gather(1, split[winner].long()[:, None])[:, 0], winner)


# ---- what must not end the process ----


@pytest.mark.parametrize("form", ["torch", "C++"])
def test_a_row_of_nan_stays_one(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "torch":
        monkeypatch.setattr(native, "library", lambda: None)
    case, class_of = make_case(0), classes_of(700)
    hidden = case.hidden.clone()
    hidden[3], hidden[5] = math.nan, math.inf
    broken = replace(case, hidden=hidden)
    _, ours = both(broken, case.streaming(), class_of)
    held = torch.tensor(
        [bool((class_of == number).any()) and number > 0 for number in range(COUNT)]
    )
    assert bool(ours.log_mass[3, held].isnan().all())
    assert bool(ours.entropy[3, held].isnan().all())
    for tokens in (ours.best, ours.sample):
        for row in (3, 5):
            assert bool((tokens[row, ~held] == -1).all())
            there = tokens[row, held]
            assert bool(((there >= 0) & (there < 700)).all())
            assert torch.equal(class_of[there].long(), held.nonzero()[:, 0])
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 5]] = False
    _, truth = both(case, case.reference(torch.float64), class_of)
    for _, one, right in pairs_of(ours, truth):
        torch.testing.assert_close(
            one[others].double(), right[others].double(), atol=1e-3, rtol=1e-4
        )
