"""The chain in C++ against its definition in torch, on large automata and awkward numbers."""

from __future__ import annotations

import math
import shutil
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import pytest
import torch
from helpers.cases import for_each
from helpers.chains import FORMS, random_automaton, random_canvas, statistics_of

from vllm_diffusion.constrain.automaton import native
from vllm_diffusion.constrain.automaton.edges import Edges
from vllm_diffusion.constrain.automaton.posterior import chain, condition
from vllm_diffusion.constrain.automaton.record import Posterior

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

built = native.library()
needs_it = pytest.mark.skipif(built is None, reason="the C++ part is not built")

CANVASES, LENGTH = 5, 37  # lengths that are no multiple of the rows read at once


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_it_is_built_where_it_can_be() -> None:
    assert built is not None, "install the package again: scripts/setup"


def both(
    automaton: TokenAutomaton, log_mass: Tensor, *, seed: int = 0
) -> tuple[Posterior, Posterior]:
    """In C++ and in torch; the best token of a class has some of its mass."""
    num, length = log_mass.shape[:2]
    draws = torch.Generator().manual_seed(seed)
    log_mass[..., 0] = -torch.inf
    best = log_mass + torch.rand(log_mass.shape, generator=draws).log()
    edges = Edges.of(automaton)
    assert edges.merged is not None
    asked = {
        "log_mass": log_mass,
        "best_log_prob": best,
        "free": best.amax(dim=2),
        "start": torch.randint(automaton.num_states, (num,), generator=draws),
        "rows": torch.randint(1, length + 1, (num,), generator=draws),
        "left": torch.randint(0, 5, (num,), generator=draws),
        "uniforms": torch.rand(num, length, generator=draws),
    }
    ours = condition(edges=edges, **asked)
    return ours, condition(edges=replace(edges, merged=None), **asked)


def assert_same(ours: Posterior, plain: Posterior) -> None:
    for field in fields(plain):
        one, other = getattr(ours, field.name), getattr(plain, field.name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), field.name
    torch.testing.assert_close(ours.log_z, plain.log_z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.marginal, plain.marginal, rtol=1e-6, atol=1e-25)
    torch.testing.assert_close(ours.ended, plain.ended, rtol=1e-6, atol=1e-25)
    assert torch.equal(ours.sample_class, plain.sample_class)
    assert torch.equal(ours.map_class, plain.map_class)
    assert torch.equal(ours.map_state, plain.map_state)


@needs_it
@for_each(spread=[0.5, 5.0, 50.0, 500.0])
@pytest.mark.parametrize(("states", "classes"), [(1, 3), (30, 9), (300, 40), (70, 500)])
def test_it_is_the_definition(states: int, classes: int, spread: float) -> None:
    automaton = random_automaton(
        states, states=states, classes=classes, vocab=2 * classes, density=0.2
    )
    draws = torch.Generator().manual_seed(states)
    logits = torch.randn(CANVASES, LENGTH, classes, generator=draws) * spread
    assert_same(*both(automaton, logits.log_softmax(dim=2)))


def far_apart(logits: Tensor) -> Tensor:
    """Masses of 1e-300 and less of a row's largest, now of these classes, now of those."""
    return logits - 690.0 * torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))


def with_holes(logits: Tensor) -> Tensor:
    """Classes that cannot stand in a row, a third of them."""
    holes = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < 0.33
    return logits.masked_fill(holes, -torch.inf)


def elsewhere(logits: Tensor) -> Tensor:
    """All mass on a class that hardly anything reads, 1000 nats above the others."""
    logits = logits.clone()
    logits[..., 1::2] -= 1000.0
    return logits


def nothing(logits: Tensor) -> Tensor:
    """A row in which no class can stand."""
    logits = logits.clone()
    logits[1:, 2] = -torch.inf
    return logits


@needs_it
@pytest.mark.parametrize("awkward", [far_apart, with_holes, elsewhere, nothing])
@for_each(seed=range(3))
def test_awkward_numbers(awkward: Callable[[Tensor], Tensor], seed: int) -> None:
    automaton = random_automaton(seed, states=90, classes=30, vocab=60, density=0.15)
    draws = torch.Generator().manual_seed(seed)
    logits = awkward(torch.randn(CANVASES, LENGTH, 30, generator=draws))
    ours, plain = both(automaton, logits, seed=seed)
    assert_same(ours, plain)
    assert bool((ours.log_z > -math.inf).any()) or awkward is nothing
    # What is free and what is not are all there is.
    whole = ours.marginal.double().sum(dim=2) + ours.ended.double()
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-6)


@needs_it
def test_not_a_number_crashes_nothing() -> None:
    automaton = random_automaton(0, states=90, classes=30, vocab=60, density=0.15)
    edges = Edges.of(automaton)
    rows = torch.full((2, LENGTH, 30), torch.nan)
    found = condition(
        rows,
        rows,
        rows[..., 0],
        edges=edges,
        start=torch.tensor([0, automaton.end]),
        rows=torch.tensor([LENGTH, 10**6]),
        left=torch.tensor([2**62, 0]),
        uniforms=rows[..., 0],
    )
    for said in (found.sample_class, found.map_class):
        assert bool(((said >= -1) & (said < 30)).all())
    assert bool(((found.map_state >= 0) & (found.map_state < automaton.num_states)).all())


@needs_it
def test_the_number_of_threads_changes_nothing() -> None:
    automaton = random_automaton(3, states=40, classes=30, vocab=60, density=0.15)
    logits = torch.randn(CANVASES, LENGTH, 30, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(both(automaton, logits.clone())[0])
    finally:
        torch.set_num_threads(threads)
    for field in fields(Posterior):
        assert torch.equal(getattr(found[0], field.name), getattr(found[1], field.name))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_canvases_on_a_gpu_are_conditioned_like_those_of_the_host(form: str) -> None:
    automaton = random_automaton(3, states=40, classes=30, vocab=60, density=0.15)
    canvases = [random_canvas(seed, automaton, LENGTH) for seed in range(CANVASES)]
    probs = torch.stack([canvas.probs for canvas in canvases]).flatten(0, 1)
    stats, classes = statistics_of(automaton, probs)
    asked = {
        "log_mass": classes.log_mass.reshape(CANVASES, LENGTH, -1),
        "best_log_prob": classes.best_log_prob.reshape(CANVASES, LENGTH, -1),
        "free": stats.top_prob.log().reshape(CANVASES, LENGTH),
        "start": torch.zeros(CANVASES, dtype=torch.int64),
        "rows": torch.full((CANVASES,), LENGTH - 3),
        "left": torch.arange(CANVASES),
        "uniforms": torch.rand(CANVASES, LENGTH, generator=torch.Generator().manual_seed(0)),
    }
    there = {name: values.cuda() for name, values in asked.items()}
    edges = Edges.of(automaton, "cuda")
    found = condition(edges=edges if form == "C++" else replace(edges, merged=None), **there)
    assert found.marginal.is_cuda
    assert_same(found.to(torch.device("cpu")), chain(edges=Edges.of(automaton), **asked))


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
    automaton = random_automaton(3)
    assert Edges.of(automaton).merged is None
    assert Edges.of(automaton).merged is None
    (message,) = log
    assert "C++ compiler" in message


def test_a_library_that_does_not_load_is_reported(installed_in: Path, log: list[str]) -> None:
    (installed_in / "_chain.so").write_text("not a library")
    assert native.library() is None
    (message,) = log
    assert "cannot be loaded" in message
