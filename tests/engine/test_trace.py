"""What a running engine records is what it did, and replaying it gives what it wrote.

One engine with a cache too small for the batch, so that every test may preempt; recordings are
compared with what the probe saw of the same requests, and with their output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.engines import DEFAULTS
from helpers.inside import Inside
from helpers.parity import ENGINE, SPEC, make_prompt
from helpers.probe import Probe, ProbedRun, ProbedStep
from helpers.rules import Deciding
from vllm import SamplingParams

from vllm_diffusion.errors import ConfigError
from vllm_diffusion.trace.file import Canvas, Trace, load
from vllm_diffusion.trace.record import VARIABLE
from vllm_diffusion.trace.replay import replay

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from helpers.engines import EnginePool
    from vllm import LLM

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.constants import EntropyBoundConstants
    from vllm_diffusion.records import Decision

pytestmark = pytest.mark.vllm

CANVAS = SPEC.canvas
SMALL_CACHE: dict[str, Any] = ENGINE | {"max_model_len": 224, "num_gpu_blocks_override": 40}


@pytest.fixture(scope="module")
def recording(
    engine_pool: EnginePool, parity_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LLM, Path]]:
    """An engine that records, and the folder it records to."""
    folder = tmp_path_factory.mktemp("traces") / "made by the engine"
    engine_pool.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(folder))
        llm = engine_pool.get(parity_checkpoint, **SMALL_CACHE)
    yield llm, folder
    engine_pool.close()


@pytest.fixture
def llm(recording: tuple[LLM, Path]) -> LLM:
    recording[0].reset_prefix_cache()
    return recording[0]


def submit(llm: LLM, name: str, prompt: list[int], seed: int, **sampling: Any) -> None:
    options = {"max_tokens": 2 * CANVAS, "ignore_eos": True} | sampling
    llm.llm_engine.add_request(
        name, {"prompt_token_ids": prompt}, SamplingParams(seed=seed, **options)
    )


def finish(llm: LLM) -> dict[str, list[int]]:
    """Step until all are done and the worker has heard of it; tokens by request."""
    texts: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            texts[output.request_id] = list(output.outputs[0].token_ids)
    llm.llm_engine.step()
    return texts


def traces(folder: Path, name: str) -> list[Trace]:
    """The request's stays in a slot, in order; its name begins the files', a count ends them."""
    paths = sorted(
        folder.glob(f"{name}-*.npz"), key=lambda path: int(path.stem.partition(".")[2] or 0)
    )
    found = [load(path) for path in paths]
    assert len({trace.request_id for trace in found}) <= 1
    return found


def assert_traced(stays: list[Trace], run: ProbedRun) -> list[int]:
    """Recording, replay and probe agree on everything; the tokens the request committed."""
    canvases = [canvas for trace in stays for canvas in trace.canvases]
    replayed = [canvas for trace in stays for canvas in replay(trace).canvases]
    assert len(canvases) == len(run.attempts)
    for canvas, again, seen in zip(canvases, replayed, run.attempts, strict=True):
        assert_canvas(canvas, seen, stays[0].rule)
        assert again.reproduced
        assert torch.equal(torch.from_numpy(again.accepted), stacked(seen, "accept"))
        assert again.next_tokens.tolist() == stacked(seen, "next_canvas").tolist()
        assert again.steps == len(seen)
        assert again.censored is not seen[-1].finished
    commits = [
        (again.recorded.start, again.tokens.tolist())
        for again in replayed
        if again.recorded.tokens is not None
    ]
    assert commits == run.commits
    return [token for _, tokens in commits for token in tokens]


def assert_canvas(canvas: Canvas, seen: list[ProbedStep], rule: EntropyBoundConstants) -> None:
    for mine, theirs in zip(canvas.steps, seen, strict=True):
        assert (mine.start, mine.step) == (theirs.start, theirs.step)
        assert mine.argmax.tolist() == theirs.argmax.tolist()
        assert mine.sample.tolist() == theirs.sample.tolist()
        assert mine.accepted.tolist() == theirs.accept.tolist()
        assert mine.finished is theirs.finished
        # The probe has the logits; accepted sets say that the entropies are the same to the bit.
        heat = rule.t_min + (rule.t_max - rule.t_min) * (1 - mine.step / rule.max_steps)
        log_prob = (theirs.logits / heat).log_softmax(dim=-1)
        first, second = log_prob.exp().topk(2, dim=-1).values.unbind(dim=-1)
        entropy = -(log_prob.exp() * log_prob).sum(dim=-1)
        expected = {"entropy": entropy, "top_prob": first, "margin": first - second}
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(mine, name), values, atol=1e-5, err_msg=name)


def stacked(seen: list[ProbedStep], field: str) -> torch.Tensor:
    return torch.stack([getattr(each, field) for each in seen])


def test_a_mixed_batch_with_preemption_replays_as_it_ran(recording: tuple[LLM, Path], llm: LLM):
    _, folder = recording
    seeds = {f"mixed{number}": 2**40 + number for number in range(6)}
    lengths = (3, 31, 64, 120, 90, 12)
    options: dict[str, dict[str, Any]] = {
        "mixed0": {"extra_args": {"diffusion_max_steps": 5}},
        "mixed2": {"extra_args": {"diffusion_fused_commit": False}},
        "mixed4": {"extra_args": {"diffusion_fused_commit": False}},
        "mixed5": {"extra_args": {"diffusion_canvas_length": 7}, "max_tokens": 20},
    }
    with Probe() as probe:
        for number, (name, seed) in enumerate(seeds.items()):
            prompt = make_prompt(lengths[number], number)
            submit(llm, name, prompt, seed, **{"max_tokens": 3 * CANVAS} | options.get(name, {}))
        texts = finish(llm)
    assert probe.preemptions > 0, "the cache was large enough for all: nothing was preempted"
    stays = {name: traces(folder, name) for name in seeds}
    assert any(len(each) > 1 for each in stays.values())
    for name, seed in seeds.items():
        committed = assert_traced(stays[name], probe.run(seed))
        assert committed[: len(texts[name])] == texts[name]
        assert {trace.seed for trace in stays[name]} == {seed}
        separate = name in {"mixed2", "mixed4"}
        for canvas in (each for trace in stays[name] for each in trace.canvases):
            assert (canvas.commit is not None) is (separate and canvas.tokens is not None)
    assert {trace.rule.max_steps for trace in stays["mixed0"]} == {5}
    assert {canvas.width for trace in stays["mixed5"] for canvas in trace.canvases} == {7}


def test_requests_with_wishes_replay_as_they_ran(recording: tuple[LLM, Path], llm: LLM):
    _, folder = recording
    prompt = make_prompt(20, 0)
    # The first guess is good enough, unless it holds a bad word.
    hasty = {"diffusion_stability_threshold": 0, "diffusion_confidence_threshold": 99.0}
    submit(llm, "plain", prompt, 9, extra_args=hasty)
    plain = finish(llm)["plain"]
    wishes: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "hot": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
        "never": {
            "extra_args": hasty,
            "_bad_words_token_ids": [plain[n : n + 2] for n in range(0, 2 * CANVAS, 2)],
        },
        "pinned": {
            "extra_args": {
                "diffusion_seed_canvas": plain[::-1][:CANVAS],
                "diffusion_pinned": [0, 5, 6],
                "diffusion_stability_threshold": 0,
            }
        },
    }
    for name, sampling in wishes.items():
        words = sampling.pop("_bad_words_token_ids", None)
        options = SamplingParams(seed=9, max_tokens=2 * CANVAS, ignore_eos=True, **sampling)
        options._bad_words_token_ids = words
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, options)
    texts = finish(llm)
    for name in wishes:
        stays = traces(folder, name)
        replayed = [canvas for trace in stays for canvas in replay(trace).canvases]
        assert all(canvas.reproduced for canvas in replayed), name
        committed = [
            token
            for canvas in replayed
            if canvas.recorded.tokens is not None
            for token in canvas.tokens.tolist()
        ]
        assert committed[: len(texts[name])] == texts[name]
    assert {trace.guarded for trace in traces(folder, "never")} == {True}
    assert {trace.rule.stability_threshold for trace in traces(folder, "pinned")} == {0}


def test_an_abort_leaves_what_there_was(recording: tuple[LLM, Path], llm: LLM):
    _, folder = recording
    with Probe() as probe:
        submit(llm, "stays", make_prompt(20), 1)
        submit(llm, "leaves", make_prompt(40, 1), 2)
        for _ in range(5):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(["leaves"])
        llm.llm_engine.step()
        (aborted,) = traces(folder, "leaves")
        texts = finish(llm)
    assert assert_traced([aborted], probe.run(2)) == []
    (canvas,) = replay(aborted).canvases
    assert canvas.censored
    assert canvas.reproduced
    (stays,) = traces(folder, "stays")
    assert assert_traced([stays], probe.run(1)) == texts["stays"]


def test_a_prompt_out_of_the_prefix_cache_is_recorded_the_same(
    recording: tuple[LLM, Path], llm: LLM
):
    _, folder = recording
    prompt = make_prompt(100, 3)
    for name in ("cold", "warm"):
        with Probe() as probe:
            submit(llm, name, prompt, 3)
            texts = finish(llm)
        (trace,) = traces(folder, name)
        assert assert_traced([trace], probe.run(3)) == texts[name]
    assert sum(probe.run(3).prompt_chunks) < len(prompt), "nothing came out of the cache"
    (cold,), (warm,) = traces(folder, "cold"), traces(folder, "warm")
    assert [step.input_crc for step in warm.steps] == [step.input_crc for step in cold.steps]


def test_a_rule_set_on_the_running_engine_is_what_is_recorded(
    recording: tuple[LLM, Path], llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    _, folder = recording

    def stops_after_three(decision: Decision, pool: CanvasPool, *seen: Any) -> Decision:
        return replace(decision, finished=pool.step[seen[0].slots] >= 2)

    sampler = Inside(llm).runner.sampler
    three_steps = Deciding(stops_after_three, sampler.pool.vocab_size)
    monkeypatch.setattr(sampler, "rule", three_steps)
    submit(llm, "ruled", make_prompt(30, 4), 4)
    texts = finish(llm)
    (trace,) = traces(folder, "ruled")
    assert [len(canvas.steps) for canvas in trace.canvases] == [3, 3]
    again = replay(trace, three_steps)
    assert again.reproduced
    assert [t for c in again.canvases if c.tokens is not None for t in c.tokens] == texts["ruled"]
    assert not replay(trace).reproduced


@pytest.mark.parametrize(
    "options",
    [
        {"diffusion_template": ["the sea", 7, "1 2", 9]},
        {"diffusion_draft": "the sea is a hill of rain " * 3, "diffusion_noise_level": 0.4},
    ],
    ids=["template", "draft"],
)
def test_text_on_a_canvas_replays(
    recording: tuple[LLM, Path], llm: LLM, options: dict[str, Any]
) -> None:
    _, folder = recording
    name = f"text{len(options)}"
    sampling = {"extra_args": options, "ignore_eos": "diffusion_draft" in options}
    submit(llm, name, make_prompt(30, 4), 4, logit_bias={0: 9.0}, **sampling)
    finish(llm)
    (trace,) = traces(folder, name)
    assert trace.canvases[0].tokens is not None
    assert replay(trace).reproduced


def test_of_several_ranks_the_first_records(
    recording: tuple[LLM, Path], llm: LLM, monkeypatch: pytest.MonkeyPatch
):
    from vllm_diffusion.engine import model_state

    monkeypatch.setenv(VARIABLE, str(recording[1]))
    state = Inside(llm).model_state
    assert state._make_recorder() is not None
    monkeypatch.setattr(model_state, "get_tensor_model_parallel_rank", lambda: 1)
    assert state._make_recorder() is None


def test_a_closing_engine_writes_what_it_still_holds(
    engine_pool: EnginePool, recording: tuple[LLM, Path], llm: LLM
):
    """The last of the engine: what follows starts its own."""
    _, folder = recording
    submit(llm, "unfinished", make_prompt(50, 5), 5)
    for _ in range(4):
        llm.llm_engine.step()
    assert traces(folder, "unfinished") == []
    held = Inside(llm).model_state._recorder
    engine_pool.close()
    (trace,) = traces(folder, "unfinished")
    assert len(trace.steps) == 3
    assert replay(trace).reproduced
    assert held is not None
    assert held._open == {}


def test_nothing_is_recorded_unless_asked_for(
    engine_pool: EnginePool,
    parity_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    llm = engine_pool.get(parity_checkpoint, **ENGINE)
    inside = Inside(llm)
    assert inside.model_state._recorder is None
    assert inside.runner.sampler.observe is None
    submit(llm, "off", make_prompt(20), 1)
    assert len(finish(llm)["off"]) == 2 * CANVAS
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_stops_the_start(
    parity_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "file").touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    with pytest.raises((ConfigError, ValueError), match=f"{VARIABLE}=.*is not a folder"):
        EngineArgs(str(parity_checkpoint), **DEFAULTS).create_engine_config()


GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(
        sys.argv[1], tensor_parallel_size=int(sys.argv[2]), dtype="float32", max_model_len=256,
        enforce_eager=True, kv_cache_memory_bytes=64 << 20,
    )
    sampling = SamplingParams(max_tokens=64, ignore_eos=True, seed=1)
    outputs = llm.generate(["hello world", "the quick brown fox"], sampling)
    print(json.dumps([output.outputs[0].token_ids for output in outputs]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_in_processes_of_their_own_leave_one_file_a_request(
    parity_checkpoint: Path, tmp_path: Path, ranks: int
):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < ranks:
        pytest.skip(f"{ranks} ranks need as many cores")
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, str(parity_checkpoint), str(ranks)],
        env={
            **os.environ,
            VARIABLE: str(tmp_path / "traces"),
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores[:ranks]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    texts = json.loads(next(x for x in result.stdout.splitlines() if x.startswith("[[")))
    replays = [replay(load(path)) for path in (tmp_path / "traces").iterdir()]
    assert all(each.reproduced for each in replays)
    written = [[t for c in each.canvases for t in c.tokens.tolist()] for each in replays]
    assert sorted(written) == sorted(texts)
