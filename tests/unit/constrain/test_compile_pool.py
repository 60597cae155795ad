"""Constraints compiled in processes of their own: joined, ordered, limited, and ended."""

import json
import os
import pickle
import signal
import time
from pathlib import Path
from threading import Event

import numpy as np
import pytest
from helpers.spelling import END, VOCABULARY, accepts, spelled

from vllm_diffusion.constrain import compile_pool
from vllm_diffusion.constrain.automaton.packed import unpacked
from vllm_diffusion.constrain.compile_pool import CompilePool
from vllm_diffusion.constrain.compile_process import CompileProcess, Job
from vllm_diffusion.constrain.outcomes import ConstraintSource, KeptByAutomaton, Refused

NAMES = [left + right for left in "abcdefgh" for right in "abcdefgh"]
SLOW = json.dumps(
    {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": 3000} for name in NAMES},
    }
)
"""Minutes of work."""


def source(text, kind="regex"):
    return ConstraintSource(kind=kind, text=text, end_ids=(END,))


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def pool():
    pool = CompilePool(processes=1)
    yield pool
    pool.end()


def test_a_process_compiles(pool):
    outcome = pool.submit(source("a{2,3}"), VOCABULARY).result(60)
    assert isinstance(outcome, KeptByAutomaton)
    assert accepts(unpacked(outcome.data), spelled("aaa", np.random.default_rng(0)))
    [pid] = pool.pids
    assert pid != os.getpid()
    refused = pool.submit(source("(a"), VOCABULARY).result(60)
    assert isinstance(refused, Refused)
    assert pool.pids == [pid]


def test_what_was_found_is_kept_in_every_room_it_holds_in(pool):
    found = pool.submit(source("b{2,3}"), VOCABULARY, room=64).result(60)
    assert pool.submit(source("b{2,3}"), VOCABULARY, room=128).result(0) is found
    narrow = pool.submit(source("b{2,900}"), VOCABULARY, room=64).result(60)
    assert pool.kept(source("b{2,900}"), VOCABULARY, room=64) is narrow
    assert pool.kept(source("b{2,900}"), VOCABULARY, room=128) is None


class Paused(CompileProcess):
    """Says what it is asked for, and answers when it may."""

    def __init__(self, **limits):
        super().__init__(**limits)
        self.asked, self.may = [], Event()

    def run(self, job, vocabulary):
        del vocabulary
        self.asked.append(job.source.text)
        self.may.wait(30)
        return Refused(message=job.source.text)


@pytest.fixture
def paused(monkeypatch):
    monkeypatch.setattr(compile_pool, "CompileProcess", Paused)
    pool = CompilePool(processes=1)
    yield pool, pool._processes[0]
    pool._processes[0].may.set()
    pool.end()


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_equal_ones_are_compiled_once_and_short_ones_first(paused):
    pool, process = paused
    first = pool.submit(source("xxx"), VOCABULARY)
    until(lambda: process.asked)
    waiting = [pool.submit(source(text), VOCABULARY) for text in ("aaaa", "aa", "aaaa", "a")]
    process.may.set()
    assert first.result(10).message == "xxx"
    assert [each.result(10).message for each in waiting] == ["aaaa", "aa", "aaaa", "a"]
    assert process.asked == ["xxx", "a", "aa", "aaaa"]


def test_a_client_that_leaves_takes_nothing_from_others(paused):
    pool, process = paused
    pool.submit(source("xxx"), VOCABULARY)
    until(lambda: process.asked)
    leaves, stays = (pool.submit(source("aa"), VOCABULARY) for _ in range(2))
    nobody = pool.submit(source("bb"), VOCABULARY)
    assert leaves.cancel()
    assert nobody.cancel()
    process.may.set()
    assert stays.result(10).message == "aa"
    last = pool.submit(source("cc"), VOCABULARY)
    assert last.result(10).message == "cc"
    assert process.asked == ["xxx", "aa", "cc"], "nobody waits for bb"


def test_two_that_come_at_once_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(compile_pool, "CompileProcess", Paused)
    pool = CompilePool(processes=2)
    one, other = pool._processes
    one.may.set()
    pool.submit(source("x"), VOCABULARY).result(10)
    until(lambda: pool._idle)
    one.may.clear()
    asked = [pool.submit(source(text), VOCABULARY) for text in ("a", "b")]
    try:
        until(lambda: len(one.asked) + len(other.asked) == 3)
    finally:
        one.may.set()
        other.may.set()
        pool.end()
    assert all(future.done() for future in asked)


def test_the_end_of_a_pool_is_told_to_everybody(paused):
    pool, process = paused
    running = pool.submit(source("xxx"), VOCABULARY)
    until(lambda: process.asked)
    waiting = pool.submit(source("a"), VOCABULARY)
    process.may.set()
    pool.end()
    assert running.done()
    assert waiting.done()


@pytest.mark.parametrize(
    ("limits", "said"),
    [({"seconds": 1}, "longer to compile than the 1 seconds"), ({"memory": 20 << 20}, "memory")],
)
def test_one_that_takes_too_much_is_refused_and_the_next_one_is_not(limits, said):
    process = CompileProcess(**limits)
    try:
        refused = process.run(job(SLOW, "json"), VOCABULARY)
        assert isinstance(refused, Refused)
        assert said in refused.message
        assert isinstance(process.run(job("a+"), VOCABULARY), KeptByAutomaton)
    finally:
        process.end()


def test_a_process_leaves_with_whoever_started_it():
    process = CompileProcess()
    process.run(job("a+"), VOCABULARY)
    pid = process.pid
    # Whoever is interrupted decides what becomes of it.
    os.kill(pid, signal.SIGINT)
    assert isinstance(process.run(job("b+"), VOCABULARY), KeptByAutomaton)
    assert process.pid == pid
    assert alive(pid)
    # As the end of this process would, in the middle of a job.
    pickle.dump(job(SLOW, "json"), process._process.stdin)
    process._process.stdin.close()
    until(lambda: not alive(pid))
    process._process.wait()
    process._process.stdout.close()


def job(text, kind="regex"):
    return Job(source=source(text, kind), vocabulary=VOCABULARY.fingerprint)
