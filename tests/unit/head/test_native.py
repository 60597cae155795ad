"""The row pass in C++, on every instruction set this processor has, against the definition."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from helpers.heads import Case, assert_no_worse, assert_same_shape, assert_same_tokens, make_case

from vllm_diffusion.head import native
from vllm_diffusion.head.sample import TILE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

built = native.library()
needs_it = pytest.mark.skipif(built is None, reason="the C++ part of the head is not built")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_it_is_built_where_it_can_be() -> None:
    assert built is not None, "install the package again: scripts/setup"


@pytest.fixture(params=native.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    number = native.ISAS.index(request.param)
    assert built is not None
    if number > built.vd_best_isa():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(native, "absorb", partial(native.absorb, isa=number))
    return number


def check(case: Case, truth_of: Case | None = None) -> None:
    plain = case.reference()(case.rows())
    truth = (truth_of or case).truth()
    assert native.fits(torch.empty(1, 64, dtype=case.hidden.dtype)), "the torch form would run"
    ours = case.streaming()(case.rows())
    assert_same_shape(ours, plain)
    assert_same_tokens(ours, truth)
    assert_no_worse(ours, plain, truth)


@needs_it
@pytest.mark.usefixtures("isa")
@for_each(vocab=[1, 63, 64, 700, 2 * TILE + 17], softcap=[30.0, 2.0, None])
def test_it_is_the_definition(vocab: int, softcap: float | None) -> None:
    case = make_case(1, vocab=vocab, hidden=16, softcap=softcap)
    check(replace(case, hidden=case.hidden * min(1.0, (softcap or 30.0) / 30.0)))


@needs_it
@pytest.mark.usefixtures("isa")
@for_each(seed=range(3))
def test_every_rewrite_at_once(seed: int) -> None:
    check(make_case(seed, rewrite=True))


@needs_it
@pytest.mark.usefixtures("isa")
@for_each(temperature=[4e-3, 0.4, 1e3])
def test_any_temperature_is_safe(temperature: float) -> None:
    case = make_case(3)
    check(replace(case, temperature=torch.full_like(case.temperature, temperature)))


@needs_it
@pytest.mark.usefixtures("isa")
def test_bf16_logits_and_weights() -> None:
    case = make_case(2, vocab=TILE + 77, dtype=torch.bfloat16)
    ours, plain = case.streaming()(case.rows()), case.reference()(case.rows())
    # The same products, rounded to bf16 alike: in fp64 from there on.
    exact = case.reference()
    logits = exact.logits(case.hidden).double()
    embedding = case.embedding.double()
    truth = replace(
        exact,
        logits=lambda _: logits,
        soft_embedding=lambda prob: prob @ embedding * 5.65,
    )(case.rows())
    assert_same_shape(ours, plain)
    assert_same_tokens(ours, truth)
    assert_no_worse(ours, plain, truth)


@needs_it
@pytest.mark.usefixtures("isa")
@for_each(softcap=[30.0, None])
def test_rows_of_nan_end_nothing(softcap: float | None) -> None:
    case = make_case(0, vocab=100, softcap=softcap)
    hidden = case.hidden.clone()
    hidden[3] = torch.nan
    ours = case.streaming()(case.rows(hidden=hidden))
    assert 0 <= int(ours.sample[3]) < 100
    assert 0 <= int(ours.argmax[3]) < 100
    assert ours.entropy[3].isnan()
    assert ours.top_prob[3].isnan()
    others = torch.arange(len(hidden)) != 3
    assert torch.equal(ours.sample[others], case.truth().sample[others])


@needs_it
def test_threads_share_the_rows() -> None:
    case = make_case(4, vocab=TILE + 5, hidden=16)
    alone = case.streaming()(case.rows())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = case.streaming()(case.rows())
    finally:
        torch.set_num_threads(before)
    assert_same_tokens(together, alone)
    torch.testing.assert_close(together.entropy, alone.entropy, atol=0, rtol=1e-5)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the module says, whichever handlers and levels vLLM has set for its loggers."""
    messages: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(native.logger, level, lambda text, *of: messages.append(text % of))
    return messages


@pytest.fixture
def installed_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in the place of the one that holds the built library."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.mark.usefixtures("installed_in")
def test_without_the_library_the_torch_form_runs_and_says_so_once(log: list[str]) -> None:
    case = make_case(0)
    assert_same_tokens(case.streaming()(case.rows()), case.truth())
    assert not native.fits(case.hidden)
    (message,) = log
    assert "C++ compiler" in message


def test_a_library_that_does_not_load_is_reported(installed_in: Path, log: list[str]) -> None:
    (installed_in / "_row_pass.so").write_text("not a library")
    assert native.library() is None
    (message,) = log
    assert "cannot be loaded" in message
