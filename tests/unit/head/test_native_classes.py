"""The class pass in C++, on every instruction set this processor has, against the definition."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.cases import for_each
from helpers.classes import COUNT, assert_numbers, assert_tokens, both, check, classes_of
from helpers.heads import make_case

from vllm_diffusion.head import native, native_classes
from vllm_diffusion.head.native_classes import CHUNK, SLOTS, WIDE, orders
from vllm_diffusion.head.sample import TILE

built = native.library()
needs_it = pytest.mark.skipif(built is None, reason="the C++ part of the head is not built")


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number = native.ISAS.index(request.param)
    assert built is not None
    if number > built.vd_best_isa():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(native_classes, "absorb", partial(native_classes.absorb, isa=number))
    return number


@needs_it
@pytest.mark.usefixtures("isa")
@for_each(vocab=[1, 5, 63, 700, 2 * TILE + 17], softcap=[30.0, None])
def test_it_is_the_definition(vocab: int, softcap: float | None) -> None:
    check(make_case(1, vocab=vocab, hidden=16, softcap=softcap), classes_of(vocab, 1))


@needs_it
@pytest.mark.usefixtures("isa")
@for_each(count=[2, 17, 80, 1500])
def test_classes_of_one_size(count: int) -> None:
    vocab = TILE + 99
    generator = torch.Generator().manual_seed(count)
    class_of = torch.randint(count, (vocab,), generator=generator, dtype=torch.int32)
    check(make_case(2, vocab=vocab, hidden=16, canvases=2, length=3), class_of, count)


@needs_it
@pytest.mark.usefixtures("isa")
def test_every_rewrite_at_once() -> None:
    check(make_case(3, rewrite=True), classes_of(700, 3))


@needs_it
@pytest.mark.usefixtures("isa")
@for_each(temperature=[4e-3, 1e3])
def test_any_temperature_is_safe(temperature: float) -> None:
    case, class_of = make_case(3), classes_of(700, 3)
    case = replace(case, temperature=torch.full_like(case.temperature, temperature))
    # Products differ in their last bits, which such a temperature shows: of the same logits.
    logits = case.reference().logits(case.hidden)
    exact = replace(case.reference(), logits=lambda _: logits.double())
    _, truth = both(case, exact, class_of)
    _, plain = both(case, case.reference(), class_of)
    _, ours = both(case, case.streaming(), class_of)
    assert torch.equal(ours.best, truth.best)
    for name in ("log_mass", "entropy", "best_log_prob", "second_log_prob"):
        one, right = getattr(ours, name), getattr(truth, name)
        assert torch.equal(one.isfinite(), right.isfinite())
    assert_numbers(ours, plain, truth)


@needs_it
@pytest.mark.usefixtures("isa")
def test_it_draws_what_the_torch_form_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    case, class_of = make_case(4, vocab=TILE + 500, hidden=16), classes_of(TILE + 500, 4)
    _, compiled = both(case, case.streaming(), class_of)
    monkeypatch.setattr(native, "library", lambda: None)
    _, plain = both(case, case.streaming(), class_of)
    assert_tokens(compiled, plain)


@needs_it
@pytest.mark.usefixtures("isa")
def test_bf16_logits() -> None:
    case, class_of = make_case(5, vocab=TILE + 77, dtype=torch.bfloat16), classes_of(TILE + 77, 5)
    # The products round to bf16 alike: in fp64 from there on.
    logits = case.reference().logits(case.hidden)
    embedding = case.embedding.double()
    exact = replace(
        case.reference(),
        logits=lambda _: logits.double(),
        soft_embedding=lambda prob: prob @ embedding,
    )
    _, truth = both(case, exact, class_of)
    _, plain = both(case, case.reference(), class_of)
    _, ours = both(case, case.streaming(), class_of)
    assert_tokens(ours, truth)
    assert_numbers(ours, plain, truth)


@needs_it
def test_threads_share_the_rows() -> None:
    case, class_of = make_case(6, vocab=TILE + 5, hidden=16), classes_of(TILE + 5, 6)
    _, alone = both(case, case.streaming(), class_of)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        _, together = both(case, case.streaming(), class_of)
    finally:
        torch.set_num_threads(before)
    assert_tokens(together, alone)
    torch.testing.assert_close(together.entropy, alone.entropy, atol=1e-6, rtol=1e-5)


@for_each(count=[2, 30, 400, 6000], first=[0, TILE])
def test_every_id_is_in_a_lane_of_its_class_once(count: int, first: int) -> None:
    vocab = 3 * TILE + 100
    generator = torch.Generator().manual_seed(count)
    size = 1 / torch.arange(1.0, count + 1)
    class_of = torch.multinomial(size, vocab, replacement=True, generator=generator).int()
    found = orders(class_of, count, first, vocab - first)
    assert len(found) == -(-(vocab - first) // TILE)
    for number, tile in enumerate(found):
        place, begin = tile.place.int(), tile.begin - tile.begin[0]
        assert int(begin[-1]) == len(place) <= SLOTS
        assert bool((begin.diff() % CHUNK == 0).all())
        seen = []
        for chunk, lane in enumerate(tile.lane):
            steps = place[begin[chunk] : begin[chunk + 1]].view(-1, CHUNK)
            real = steps < TILE
            ids = steps + first + number * TILE
            classes = class_of[torch.where(real, ids, 0)]
            assert bool((classes == lane)[real].all())
            assert bool((lane == lane[0]).all()) == (chunk < tile.wide)
            if chunk < tile.wide:
                assert int(real.sum()) >= WIDE
            else:  # a class has one lane, or what is running would be written twice
                held = lane[lane > 0]
                assert len(held.unique()) == len(held)
            seen.append(ids[real])
        ids = torch.cat(seen).sort().values if seen else torch.zeros(0)
        last = min(vocab, first + (number + 1) * TILE)
        there = torch.arange(first + number * TILE, last)
        assert torch.equal(ids.long(), there[class_of[there] > 0])


def test_the_worst_order_of_a_tile_fits_the_slots() -> None:
    # The worst there is: runs just too short to be wide, and as many different ones as fit.
    lengths, left = [], TILE
    for length in range(WIDE - 1, 0, -1):
        take = min(length, left)
        lengths.append(take)
        left -= take
    class_of = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
    (tile,) = orders(class_of.int(), len(lengths) + 1, 0, len(class_of))
    assert len(tile.place) <= SLOTS


def test_the_order_is_made_once_for_a_set_of_classes() -> None:
    class_of = classes_of(700, 8)
    assert orders(class_of, COUNT, 0, 700) is orders(class_of, COUNT, 0, 700)
    assert orders(class_of.clone(), COUNT, 0, 700) is not orders(class_of, COUNT, 0, 700)
