"""Recording, its file, replaying it: made-up statistics drive a real pool through ``advance``."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.rules import Deciding
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_diffusion import cli, step
from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.denoise.constants import EntropyBoundConstants
from vllm_diffusion.denoise.noise import UniformNoise
from vllm_diffusion.denoise.renoise import initial_canvas
from vllm_diffusion.errors import ConfigError, TraceError
from vllm_diffusion.family import Family
from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision
from vllm_diffusion.rules.entropy_bound import EntropyBound
from vllm_diffusion.trace.file import Trace, load, to_bytes
from vllm_diffusion.trace.record import VARIABLE, Recorder, file_names, trace_folder
from vllm_diffusion.trace.replay import Replay, replay

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.rules.rule import Rule

SLOTS, LENGTH, VOCAB = 4, 12, 997
SEED = (7 << 40) + 3

FAMILY = Family(name="uniform", rule="entropy_bound", ends=(3, 4))
PUBLISHED = EntropyBound(UniformNoise(VOCAB))
CONSTANTS = EntropyBoundConstants(
    max_steps=6,
    t_min=0.3,
    t_max=0.7,
    entropy_bound=0.1,
    confidence_threshold=0.05,
    stability_threshold=1,
)


@dataclass
class Seen:
    """One denoising step as the rule saw it, beside the recorder. W is the canvas's width."""

    canvas: list[int]
    stats: dict[str, Tensor]  # [W]
    accept: list[bool]
    next_tokens: list[int]
    finished: bool


@dataclass
class Request:
    """What one slot went through."""

    start: int
    width: int
    canvases: list[list[Seen]] = field(default_factory=list)
    commits: list[tuple[int, list[int], int]] = field(default_factory=list)
    """(start, tokens, steps)."""


class Live:
    """A pool whose model is a random number generator, recorded, and watched on its own."""

    def __init__(
        self, folder: Path, rule: EntropyBoundConstants = CONSTANTS, denoise: Rule = PUBLISHED
    ) -> None:
        self.pool = CanvasPool(
            num_slots=SLOTS,
            canvas_length=LENGTH,
            hidden_size=3,
            vocab_size=VOCAB,
            constants=rule,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.recorder = Recorder(folder, FAMILY)
        self.rule = denoise
        self.rng = np.random.default_rng(0)
        self.requests: dict[int, Request] = {}

    def admit(
        self,
        slot: int,
        name: str,
        start: int = 5,
        width: int = LENGTH,
        *,
        seed: int | None = None,
        max_steps: int | None = None,
        fused: bool = False,
    ) -> Request:
        default = self.pool.default
        rule = replace(default, max_steps=max_steps or default.max_steps)
        seed = SEED + slot if seed is None else seed
        self.pool.admit(slot, seed=seed, constants=rule, fused=fused)
        self.recorder.begin(self.pool, slot, name)
        position = start + torch.arange(LENGTH)[None]
        self.pool.begin(torch.tensor([slot]), position)
        self.requests[slot] = Request(start, width)
        return self.requests[slot]

    def run(self, *slots: int, steps: int = 1) -> None:
        for _ in range(steps):
            width = torch.tensor([self.requests[slot].width for slot in slots])
            start = torch.tensor([self.requests[slot].start for slot in slots])
            batch = CanvasBatch(
                slots=torch.tensor(slots),
                width=width,
                position=start[:, None] + torch.arange(LENGTH),
                valid=torch.arange(LENGTH) < width[:, None],
            )
            causal, taken = self.pool.causal.tolist(), self.pool.step.tolist()
            hidden = torch.zeros(len(slots), LENGTH, 3)
            emission = step.advance(
                self.pool,
                batch,
                hidden,
                self._head,
                self._watched(causal),
                observe=self.recorder.observe,
            )
            for row, slot in enumerate(slots):
                request = self.requests[slot]
                if emission.count[row]:
                    steps = taken[slot] + (not causal[slot])
                    tokens = emission.tokens[row, : request.width].tolist()
                    assert int(emission.steps[row]) == steps
                    request.commits.append((request.start, tokens, steps))
                    request.start += request.width

    def _head(self, asked: Rows) -> CanvasStats:
        """Surer with every step, with ties, zeros, and an argmax that settles."""
        assert asked.rewrite is None
        rows = len(asked)
        sure = 0.3 ** asked.noise.step.numpy()
        entropy = self.rng.exponential(sure) * (self.rng.random(rows) < 0.9)
        entropy[self.rng.random(rows) < 0.2] = 0.03125
        moves = self.rng.random(rows) < sure / 4
        top = self.rng.random(rows)
        return CanvasStats(
            argmax=torch.from_numpy(np.where(moves, self.rng.integers(0, VOCAB, rows), 11)),
            sample=torch.from_numpy(self.rng.integers(0, VOCAB, rows)),
            entropy=torch.from_numpy(entropy.astype(np.float32)),
            top_prob=torch.from_numpy(top.astype(np.float32)),
            margin=torch.from_numpy((top * self.rng.random(rows)).astype(np.float32)),
            soft_embedding=torch.ones(rows, 3),
        )

    def _watched(self, causal: list[bool]) -> Rule:
        def watch(
            _: Decision, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats
        ) -> Decision:
            decision = self.rule.decide(pool, batch, stats)
            for row, slot in enumerate(batch.slots.tolist()):
                request, at = self.requests[slot], (row, slice(self.requests[slot].width))
                if causal[slot]:
                    continue
                if int(pool.step[slot]) == 0:
                    request.canvases.append([])
                request.canvases[-1].append(
                    Seen(
                        canvas=pool.tokens[slot, at[1]].tolist(),
                        stats={
                            name: getattr(stats, name)[at].clone()
                            for name in ("argmax", "sample", "entropy", "top_prob", "margin")
                        },
                        accept=decision.accept[at].tolist(),
                        next_tokens=decision.next_tokens[at].tolist(),
                        finished=bool(decision.finished[row]),
                    )
                )
            return decision

        return Deciding(watch, VOCAB)


def recorded(folder: Path, *, steps: int = 24, name: str = "a", **options: Any) -> Trace:
    """One request of some canvases, recorded."""
    live = Live(folder, **options)
    live.admit(0, name)
    live.run(0, steps=steps)
    live.recorder.end(0)
    return load(folder / f"{name}.npz")


def bits(values: Any) -> list[int]:
    array = np.asarray(values)
    return array.view(np.uint32 if array.dtype == np.float32 else array.dtype).tolist()


def assert_recorded(trace: Trace, live: Request) -> None:
    """Every number of every step."""
    assert len(trace.canvases) == len(live.canvases)
    for canvas, seen in zip(trace.canvases, live.canvases, strict=True):
        assert [s.step for s in canvas.steps] == list(range(len(seen)))
        assert {s.width for s in canvas.steps} == {live.width}
        assert {s.start for s in canvas.steps} == {canvas.start}
        for mine, theirs in zip(canvas.steps, seen, strict=True):
            for name, values in theirs.stats.items():
                assert bits(getattr(mine, name)) == bits(values), name
            assert mine.accepted.tolist() == theirs.accept
            assert mine.finished is theirs.finished
            assert mine.committing is False
    left = [canvas for canvas in trace.canvases if canvas.tokens is not None]
    assert [(c.start, c.tokens.tolist(), len(c.steps)) for c in left] == live.commits
    commits = [canvas.commit for canvas in left]
    assert commits == [None] * len(left) if trace.fused else all(commits)
    for canvas, commit in zip(left, commits, strict=True):
        if commit is None:
            continue
        assert (commit.start, commit.step) == (canvas.start, len(canvas.steps))
        assert commit.argmax.tolist() == canvas.tokens.tolist()
        assert commit.committing
        assert not commit.finished
        for nothing in (commit.sample, commit.entropy, commit.top_prob, commit.accepted):
            assert not nothing.any(), "commit rows have no distribution"


def assert_replayed(replayed: Replay, live: Request) -> None:
    """The replay against the live run, not against the recording."""
    committed = iter(live.commits)
    for canvas, seen in zip(replayed.canvases, live.canvases, strict=True):
        assert canvas.accepted.tolist() == [s.accept for s in seen]
        assert canvas.next_tokens.tolist() == [s.next_tokens for s in seen]
        assert canvas.steps == len(seen)
        assert canvas.censored is not seen[-1].finished
        if canvas.recorded.tokens is not None:
            assert canvas.tokens is not None
            start, tokens, steps = next(committed)
            assert (canvas.recorded.start, canvas.tokens.tolist()) == (start, tokens)
            assert canvas.steps == steps
            assert canvas.same_tokens is True
    assert next(committed, None) is None
    assert replayed.reproduced


# ---- the reference rule ----


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    rng=st.integers(0, 2**32),
    widths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=SLOTS),
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=SLOTS, max_size=SLOTS),
    limits=st.lists(st.integers(1, 6), min_size=SLOTS, max_size=SLOTS),
    bound=st.sampled_from([0.0, 0.03125, 0.1, 3.0]),
    threshold=st.sampled_from([0.0, 0.02, 0.5]),
    stability=st.integers(0, 3),
    hold=st.sampled_from([0.0, 0.1, 0.9]),
    doubt=st.sampled_from([0.0, 0.3, 3.0]),
    steps=st.integers(1, 16),
    fused=st.booleans(),
)
def test_any_recorded_batch_replays_bit_for_bit(
    *,
    rng: int,
    widths: list[int],
    seeds: list[int],
    limits: list[int],
    bound: float,
    threshold: float,
    stability: int,
    hold: float,
    doubt: float,
    steps: int,
    fused: bool,
) -> None:
    rule = replace(
        CONSTANTS,
        entropy_bound=bound,
        confidence_threshold=threshold,
        stability_threshold=stability,
        hold_threshold=hold,
        doubt_threshold=doubt,
    )
    with TemporaryDirectory() as folder:
        live = Live(Path(folder), rule)
        live.rng = np.random.default_rng(rng)
        slots = range(len(widths))
        for slot in slots:
            live.admit(
                slot,
                f"r{slot}",
                9 * slot,
                widths[slot],
                seed=seeds[slot],
                max_steps=limits[slot],
                fused=fused and slot % 2 == 0,
            )
        for taken in range(steps):
            # Uneven company, as requests arrive and wait.
            live.run(*(slot for slot in slots if slot == 0 or (taken + slot) % 3))
        for slot in slots:
            live.recorder.end(slot)
            if not live.requests[slot].canvases:
                continue
            trace = load(Path(folder) / f"r{slot}.npz")
            assert trace.seed == seeds[slot]
            assert trace.rule == replace(rule, max_steps=limits[slot])
            assert_recorded(trace, live.requests[slot])
            assert_replayed(replay(trace), live.requests[slot])


def test_the_recorded_inputs_are_those_the_replay_makes(tmp_path: Path) -> None:
    """The first from seed and position, each following one from the decision before it."""
    live = Live(tmp_path)
    request = live.admit(1, "a", start=40, width=7)
    live.run(1, steps=20)
    live.recorder.end(1)
    replayed = replay(load(tmp_path / "a.npz"))
    assert len(request.canvases) > 2
    for canvas, seen in zip(replayed.canvases, request.canvases, strict=True):
        position = canvas.recorded.start + torch.arange(7)[None]
        first = initial_canvas(live.pool.seed[1:2], position, VOCAB)[0].tolist()
        assert [first, *canvas.next_tokens.tolist()[:-1]] == [s.canvas for s in seen]
        assert canvas.on_trajectory


def test_a_preempted_request_leaves_a_file_for_each_stay(tmp_path: Path) -> None:
    live = Live(tmp_path)
    stays = [live.admit(0, "a", seed=5)]
    live.run(0, steps=2)
    live.recorder.end(0)
    stays.append(live.admit(2, "a", seed=5))
    live.run(2, steps=20)
    live.recorder.end(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.1.npz", "a.npz"]
    for name, request in zip(["a.npz", "a.1.npz"], stays, strict=True):
        trace = load(tmp_path / name)
        assert trace.request_id == "a"
        assert_recorded(trace, request)
        assert_replayed(replay(trace), request)
    (interrupted,) = load(tmp_path / "a.npz").canvases
    assert not interrupted.finished
    assert interrupted.commit is None


def test_a_canvas_that_finished_and_was_never_committed(tmp_path: Path) -> None:
    live = Live(tmp_path)
    request = live.admit(0, "a")
    while not bool(live.pool.causal[0]):
        live.run(0)
    live.recorder.end(0)
    (canvas,) = (replayed := replay(load(tmp_path / "a.npz"))).canvases
    assert_replayed(replayed, request)
    assert canvas.tokens is not None
    assert canvas.same_tokens is None


# ---- other rules ----


def changed(decision: Decision, **fields: Tensor) -> Decision:
    return replace(decision, **fields)


never_stops = Deciding(
    lambda decision, *_: changed(decision, finished=torch.zeros_like(decision.finished)), VOCAB
)
stops_after_two = Deciding(
    lambda decision, pool, batch, _: changed(decision, finished=pool.step[batch.slots] >= 1), VOCAB
)
accepts_nothing = Deciding(
    lambda decision, *_: changed(decision, accept=torch.zeros_like(decision.accept)), VOCAB
)
renoises_with_zeros = Deciding(
    lambda decision, *_: changed(decision, next_tokens=decision.next_tokens * decision.accept),
    VOCAB,
)


def test_a_rule_that_does_not_stop_in_time_is_censored(tmp_path: Path) -> None:
    trace = recorded(tmp_path)
    replayed = replay(trace, never_stops)
    for canvas in replayed.canvases:
        assert canvas.censored
        assert canvas.tokens is None
        assert canvas.same_tokens is None
        assert canvas.diverged is None
        assert canvas.reproduced is not canvas.recorded.finished
    assert replayed.steps == replayed.recorded_steps
    assert not replayed.reproduced


def test_a_rule_that_stops_sooner_says_what_it_saves_and_whether_it_costs(tmp_path: Path) -> None:
    trace = recorded(tmp_path, steps=60)
    replayed = replay(trace, stops_after_two)
    outcomes = set()
    longer = [canvas for canvas in replayed.canvases if len(canvas.recorded.steps) > 2]
    assert longer
    for canvas in longer:
        assert canvas.steps == 2
        assert canvas.tokens is not None
        assert canvas.tokens.tolist() == canvas.recorded.steps[1].argmax.tolist()
        assert canvas.diverged is None
        assert canvas.on_trajectory, "what it would have done is known"
        if canvas.recorded.commit:
            same = canvas.tokens.tolist() == canvas.recorded.commit.argmax.tolist()
            assert canvas.same_tokens is same
            outcomes.add(same)
    assert outcomes == {True, False}, "the recording should have both"
    assert replayed.recorded_steps == sum(len(canvas.steps) for canvas in trace.canvases)
    assert replayed.steps == sum(min(2, len(canvas.steps)) for canvas in trace.canvases)
    assert replayed.steps < replayed.recorded_steps


def test_accepting_other_positions_leaves_the_recorded_trajectory(tmp_path: Path) -> None:
    trace = recorded(tmp_path)
    replayed = replay(trace, accepts_nothing)
    assert {canvas.diverged for canvas in replayed.canvases} == {0}
    assert not replayed.reproduced

    def accepts_all_from_step_two(
        decision: Decision, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats
    ) -> Decision:
        late = pool.step[batch.slots] >= 2
        everything = decision.accept | late[:, None]
        tokens = torch.where(everything, stats.sample, decision.next_tokens)
        return changed(decision, accept=everything, next_tokens=tokens)

    for canvas in replay(trace, Deciding(accepts_all_from_step_two, VOCAB)).canvases:
        short = [s.accepted.all() for s in canvas.recorded.steps]
        differs = [index for index, full in enumerate(short) if index >= 2 and not full]
        assert canvas.diverged == (differs[0] if differs else None)
        assert canvas.on_trajectory is not any(at + 1 < len(short) for at in differs)


def test_other_noise_leaves_it_too_with_the_same_positions_accepted(tmp_path: Path) -> None:
    for canvas in replay(recorded(tmp_path), renoises_with_zeros).canvases:
        assert canvas.diverged is None
        assert canvas.on_trajectory is (canvas.steps == 1)


def test_the_rule_that_was_recorded_is_reproduced_whatever_it_is(tmp_path: Path) -> None:
    trace = recorded(tmp_path, denoise=renoises_with_zeros)
    assert replay(trace, renoises_with_zeros).reproduced
    assert not replay(trace).reproduced


def test_other_constants_are_another_trace(tmp_path: Path) -> None:
    trace = recorded(tmp_path)
    eager = replace(trace.rule, confidence_threshold=100.0, stability_threshold=0)
    replayed = replay(replace(trace, rule=eager))
    assert {canvas.steps for canvas in replayed.canvases} == {1}
    assert replayed.steps == len(trace.canvases)


def test_a_trace_of_other_noise_is_not_reproduced(tmp_path: Path) -> None:
    trace = recorded(tmp_path)
    assert replay(trace).reproduced
    assert not replay(replace(trace, seed=trace.seed + 1)).reproduced


# ---- the hook ----


def test_the_observer_sees_the_step_decided_and_not_yet_applied(tmp_path: Path) -> None:
    live = Live(tmp_path)
    request = live.admit(0, "a")
    seen = []

    def observe(
        pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats, decision: Decision
    ) -> None:
        seen.append((pool.tokens[0].tolist(), int(pool.step[0]), decision.next_tokens[0].tolist()))
        assert batch.slots.tolist() == [0]
        assert stats.entropy.shape == (1, LENGTH)

    live.recorder.observe = observe  # type: ignore[method-assign]
    live.run(0, steps=2)
    assert [canvas for canvas, _, _ in seen] == [s.canvas for s in request.canvases[0]]
    assert [taken for _, taken, _ in seen] == [0, 1]
    assert [after for _, _, after in seen] == [s.next_tokens for s in request.canvases[0]]


# ---- the recorder ----


def test_it_keeps_nothing_of_a_request_that_ended(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.admit(0, "a")
    live.admit(1, "b")
    live.run(0, 1, steps=3)
    held = live.recorder._open[0].steps[0]
    assert held.entropy.base is None, "a view keeps the batch alive"
    live.recorder.end(0)
    assert list(live.recorder._open) == [1]
    live.recorder.close()
    assert live.recorder._open == {}
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "b.npz"}
    live.run(0, 1)
    assert live.recorder._open == {}, "slots it was not told of are none of its business"


def test_a_request_without_a_canvas_leaves_no_file(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.admit(0, "a")
    live.recorder.end(0)
    live.recorder.end(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "request_id",
    [
        "../../escaped",
        "/escaped",
        "..",
        ".",
        "",
        "a/../../b",
        "nul\0nul",
        "line\nline",
        "-rf",
        "x" * 5000,
        "ümläut 日本",
        "c:\\windows",
        "%2e%2e%2f",
    ],
)
def test_no_request_id_leaves_the_folder(tmp_path: Path, request_id: str) -> None:
    folder = tmp_path / "outer" / "traces"
    folder.mkdir(parents=True)
    live = Live(folder)
    for slot in (0, 1):
        live.admit(slot, request_id)
    live.run(0, 1, steps=2)
    live.recorder.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    for path in files:
        assert path.parent == folder
        assert not path.name.startswith(".")
        assert load(path).request_id == request_id


def test_names_are_found_by_request_id_and_keep_the_end_that_makes_them_unique() -> None:
    assert next(file_names("chatcmpl-42-0-1a2b")) == "chatcmpl-42-0-1a2b.npz"
    long = ["y" * 300 + ending for ending in ("-1a2b", "-3c4d")]
    first, second = (next(file_names(name)) for name in long)
    assert first != second
    assert first.startswith("y" * 50)


def test_a_file_that_is_there_is_never_touched(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "traces", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.write_text("mine")
    (folder / "a.npz").symlink_to(elsewhere)
    (folder / "a.1.npz").write_text("mine")
    live = Live(folder)
    live.admit(0, "a")
    live.run(0)
    live.recorder.end(0)
    assert elsewhere.read_text() == (folder / "a.1.npz").read_text() == "mine"
    assert load(folder / "a.2.npz").request_id == "a"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    logger = logging.getLogger("vllm.vllm_diffusion.trace.record")
    monkeypatch.setattr(logger, "warning", lambda text, *of: messages.append(text % of))
    return messages


def test_a_folder_that_vanished_costs_the_trace_and_nothing_else(
    tmp_path: Path, warnings: list[str]
) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    live = Live(folder)
    live.admit(0, "a")
    live.run(0)
    folder.rmdir()
    live.recorder.end(0)
    (warning,) = warnings
    assert "'a'" in warning
    assert "No such file" in warning
    assert live.recorder._open == {}
    live.run(0)


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[:100])
            raise OSError(28, "No space left on device")

    def open_on_full_disk(path: Path, mode: str) -> Full:
        return Full(path, mode)

    live = Live(tmp_path)
    live.admit(0, "a")
    live.admit(1, "b")
    live.run(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_on_full_disk)
        live.recorder.end(0)
    live.recorder.end(1)
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert [path.name for path in tmp_path.iterdir()] == ["b.npz"]


def test_recording_is_off_unless_the_variable_names_a_folder(tmp_path: Path) -> None:
    assert trace_folder({}) is None
    assert trace_folder({VARIABLE: ""}) is None
    made = tmp_path / "not" / "yet"
    assert trace_folder({VARIABLE: str(made)}) == made
    assert list(made.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    asked = str(tmp_path / "file" / "traces")
    with pytest.raises(ConfigError) as caught:
        trace_folder({VARIABLE: asked})
    assert f"{VARIABLE}={asked}" in str(caught.value)
    assert "unset it" in str(caught.value)


# ---- the file ----


def test_a_file_says_who_wrote_it_and_is_smaller_than_what_it_holds(tmp_path: Path) -> None:
    from vllm_diffusion import __version__

    trace = recorded(tmp_path)
    assert trace.plugin_version == __version__
    assert (trace.vocab_size, trace.canvas_length) == (VOCAB, LENGTH)
    assert trace.seed == SEED
    assert sum(len(canvas.steps) for canvas in trace.canvases) < len(trace.steps) == 24
    for one in trace.steps:
        assert one.argmax.dtype == one.sample.dtype == np.int32
        assert one.entropy.dtype == one.top_prob.dtype == one.margin.dtype == np.float32
        assert one.accepted.dtype == np.bool_
        assert one.accepted.shape == one.entropy.shape == (LENGTH,)


def test_no_cut_and_no_flipped_byte_goes_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    trace = recorded(tmp_path)
    content = path.read_bytes()
    for length in range(0, len(content), 53):
        path.write_bytes(content[:length])
        with pytest.raises(TraceError, match="is not a complete trace"):
            load(path)
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            read = load(path)
        except TraceError:
            continue
        # Dates and attributes in the archive's directory mean nothing.
        assert to_bytes(read) == to_bytes(trace), f"byte {at}"


OTHERS = {
    b"": "it is empty",
    b"no archive": "it is not an npz archive",
    b"PK\x03\x04": "File is not a zip file",
    b"\x93NUMPY": "it is not an npz archive",
    b"\x80\x04.": "it is not an npz archive",
}


@pytest.mark.parametrize("content", OTHERS)
def test_another_file_is_no_trace(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"a\.npz is not a complete trace of format 1") as caught:
        load(path)
    assert f"{OTHERS[content]}. Record it again" in str(caught.value)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "a.npz")


def rewritten(path: Path, **arrays: Any) -> Path:
    """The file with other arrays in it; None leaves one out."""
    with np.load(path) as archive:
        content = dict(archive) | arrays
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return path


def header_with(path: Path, **fields: Any) -> np.ndarray:
    with np.load(path) as archive:
        header = json.loads(archive["header"].tobytes()) | fields
    return np.frombuffer(json.dumps(header).encode(), np.uint8)


def test_a_trace_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    recorded(tmp_path)
    path = tmp_path / "a.npz"
    rewritten(path, header=header_with(path, format=2, plugin_version="9.9"))
    with pytest.raises(TraceError, match=r"format 2, by 9\.9"):
        load(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"entropy": None},
        {"header": None},
        {"header": np.frombuffer(b"[]", np.uint8)},
        {"header": np.frombuffer(b"\xff", np.uint8)},
        {"entropy": np.zeros(3, np.float32)},
        {"entropy": np.zeros(24 * LENGTH)},
        {"accepted": np.zeros(3, np.uint8)},
        {"accepted": np.zeros(24 * LENGTH // 8, np.int64)},
        {"step": np.ones(24, np.int32)},
        {"committing": np.ones(24, np.bool_)},
        {"width": np.zeros(0, np.int32)},
        {"width": np.array([0, 24 * LENGTH] + [0] * 22, np.int32)},
        {"width": np.array([2 * LENGTH, 0] + [LENGTH] * 22, np.int32)},
        {"width": np.full((24, 1), LENGTH, np.int32)},
        {"width": np.array(["wide"] * 24)},
        {"width": np.array([{}] * 24)},
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, arrays: dict[str, Any]) -> None:
    recorded(tmp_path)
    with pytest.raises(TraceError):
        load(rewritten(tmp_path / "a.npz", **arrays))


@pytest.mark.parametrize(
    "fields", [{"rule": {}}, {"rule": None}, {"canvas_length": "12"}, {"format": None}]
)
def test_a_header_that_lacks_something_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    recorded(tmp_path)
    path = tmp_path / "a.npz"
    rewritten(path, header=header_with(path, **fields))
    with pytest.raises(TraceError):
        load(path)


# ---- the command ----


def test_the_command_shows_a_trace_on_one_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = recorded(tmp_path, steps=300)
    assert len(trace.canvases) > 30
    assert cli.main(["trace", str(tmp_path / "a.npz"), "--replay"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 40
    assert "request 'a'" in lines[0]
    first = lines[4]
    entropies = [f"{s.entropy.mean():.2g}" for s in trace.canvases[0].steps]
    assert first.split()[:5] == ["0", "5", "12", str(len(entropies)), "committed"]
    assert first.split()[5] == entropies[0]
    assert first.endswith("the same")
    assert f"{len(trace.canvases)} of {len(trace.canvases)} canvases equal bit for bit" in lines[-2]


def test_the_command_says_what_differs_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path, denoise=stops_after_two)
    assert cli.main(["trace", str(tmp_path / "a.npz")]) == 0
    assert "replayed" not in capsys.readouterr().out
    assert cli.main(["trace", str(tmp_path / "a.npz"), "--replay"]) == 1
    assert "no stop" in capsys.readouterr().out


def test_the_command_goes_on_after_a_file_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded(tmp_path)
    (tmp_path / "b.npz").write_bytes(b"no archive")
    paths = [str(tmp_path / name) for name in ("missing.npz", "b.npz", "a.npz")]
    assert cli.main(["trace", *paths]) == 1
    printed = capsys.readouterr().out
    assert "No such file" in printed
    assert "is not a complete trace" in printed
    assert "request 'a'" in printed
