"""Traces of ``reveal``: what a step saw and revealed, and replaying it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.cases import for_each
from helpers.reveal_model import (
    FAMILIES,
    GRID,
    MASK,
    ONE_A_STEP,
    SLOTS,
    WHOLE,
    Asked,
    Engine,
    random_request,
)

from vllm_diffusion import cli
from vllm_diffusion.denoise.constants import REVEAL_BY
from vllm_diffusion.errors import TraceError
from vllm_diffusion.trace.file import Trace, load
from vllm_diffusion.trace.record import Recorder
from vllm_diffusion.trace.replay import replay

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_diffusion.family import Family


def recorded(folder: Path, family: Family, asked: dict[int, Asked]) -> dict[int, Trace]:
    """Run all slots until each has emitted a canvas, recorded."""
    engine = Engine(family, asked)
    recorder = Recorder(folder, family)
    engine.observe = recorder.observe
    for slot in asked:
        recorder.begin(engine.pool, slot, f"r{slot}")
    found = engine.run()
    traces = {}
    for slot in asked:
        recorder.end(slot)
        trace = traces[slot] = load(folder / f"r{slot}.npz")
        went, tokens, steps, _ = found[slot]
        (canvas,) = trace.canvases
        assert len(canvas.steps) == steps
        assert canvas.tokens is not None
        assert canvas.tokens[: len(tokens)].tolist() == tokens
        for step, places, after in zip(canvas.steps, went.revealed, went.tokens, strict=True):
            assert step.accepted.nonzero()[0].tolist() == places
            assert step.argmax.tolist() == after
            assert step.tokens is not None
            assert np.array_equal(step.tokens[~step.accepted], step.argmax[~step.accepted])
            assert (step.tokens[step.accepted] == MASK).all()
            assert np.array_equal(step.sample[step.accepted], step.argmax[step.accepted])
    return traces


@for_each(seed=range(20), name=FAMILIES)
def test_a_replay_of_the_recorded_rule_says_the_recorded_tokens(
    seed: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    asked = {slot: random_request(rng, slot) for slot in range(rng.randint(1, SLOTS))}
    # A replay takes what a canvas is given from the request, which has a seed canvas for it.
    asked = {slot: replace(each, given=()) for slot, each in asked.items()}
    folder = tmp_path_factory.mktemp("traces")
    for slot, trace in recorded(folder, FAMILIES[name], asked).items():
        assert trace.family == FAMILIES[name]
        assert trace.rule == asked[slot].constants
        assert trace.ends == asked[slot].ends
        assert trace.scored_by == asked[slot].constants.reveal_by
        replayed = replay(trace)
        assert replayed.reproduced
        (canvas,) = replayed.canvases
        assert canvas.tokens is not None
        assert np.array_equal(canvas.tokens, canvas.recorded.tokens)


def test_text_that_a_canvas_begins_with_is_replayed(tmp_path: Path) -> None:
    given = (-1, 33, -1, -1, 12, -1, 40, 9)
    trace = recorded(tmp_path, GRID, {0: Asked(ONE_A_STEP, seed=1, start=8, given=given)})[0]
    assert trace.canvases[0].steps[0].tokens is not None
    assert trace.canvases[0].steps[0].tokens.tolist() == [MASK if at < 0 else at for at in given]
    assert not replay(trace).reproduced
    assert replay(replace(trace, seed_canvas=given, prompt_length=8)).reproduced


def test_another_rule_is_replayed_as_far_as_it_reveals_the_same(tmp_path: Path) -> None:
    constants = replace(ONE_A_STEP, reveal_threshold=0.5, reveal_by="drawn")
    asked = Asked(constants, seed=4, start=8, temperature=3.0)
    trace = recorded(tmp_path, WHOLE, {0: asked})[0]
    steps = len(trace.canvases[0].steps)
    # A threshold that nothing reaches leaves the schedule.
    (slower,) = replay(replace(trace, rule=replace(constants, reveal_threshold=1.0))).canvases
    assert slower.diverged is not None
    assert not slower.on_trajectory
    assert slower.accepted.sum(axis=1).max() == 1
    (faster,) = replay(replace(trace, rule=replace(constants, max_steps=1))).canvases
    assert faster.steps == 1 < steps
    assert faster.accepted.all()


@for_each(by=REVEAL_BY)
def test_a_trace_has_the_score_that_its_rule_ranks_by(by: str, tmp_path: Path) -> None:
    constants = replace(ONE_A_STEP, reveal_by=by)
    asked = Asked(constants, seed=4, start=8, temperature=1.7)
    (tmp_path / by).mkdir()
    trace = recorded(tmp_path / by, WHOLE, {0: asked})[0]
    for step in trace.canvases[0].steps:
        assert step.score is not None
        (place,) = step.accepted.nonzero()[0]
        assert step.score[place] == step.score[step.tokens == MASK].max()
    for other in REVEAL_BY:
        changed = replace(trace, rule=replace(constants, reveal_by=other))
        if other in {"drawn", "model"} and other != by:
            with pytest.raises(TraceError, match=f"by {other}: it was recorded by {by}"):
                replay(changed)
        else:
            assert replay(changed).reproduced == (other == by)


def test_one_screen_shows_and_replays_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    recorded(tmp_path, GRID, {0: Asked(ONE_A_STEP, seed=1, start=8)})
    assert cli.main(["trace", "--replay", str(tmp_path / "r0.npz")]) == 0
    shown = capsys.readouterr().out
    assert "rule: max_steps=8, reveal_threshold=0.0, reveal_by=model" in shown
    assert "replayed: 1 of 1 canvases equal bit for bit" in shown


def test_a_canvas_under_way_is_no_canvas_of_the_trace_yet(tmp_path: Path) -> None:
    engine = Engine(GRID, {0: Asked(ONE_A_STEP, seed=1, start=8)})
    recorder = Recorder(tmp_path, GRID)
    engine.observe = recorder.observe
    recorder.begin(engine.pool, 0, "a")
    for _ in range(3):
        engine.step(0)
    recorder.end(0)
    trace = load(tmp_path / "a.npz")
    (canvas,) = trace.canvases
    assert (len(canvas.steps), canvas.tokens, canvas.finished) == (3, None, False)
    assert torch.equal(torch.from_numpy(canvas.steps[-1].argmax), engine.pool.tokens[0].int())
    assert replay(trace).reproduced
