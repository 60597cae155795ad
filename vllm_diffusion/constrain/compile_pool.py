"""The queue of constraints to compile: few at a time, shortest first, equal ones once.

    submit -> cached?           the outcome, at once
           -> being compiled?   the outcome, when it is ready
           -> queued            shortest text first, until a process is free

A client that leaves does not affect others that wait for the same constraint. A constraint that
nobody waits for any more is not started.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future
from heapq import heappop, heappush
from itertools import count
from threading import Condition, Thread
from typing import TYPE_CHECKING, Final

from vllm_diffusion.constrain.compile_process import CompileProcess, Job
from vllm_diffusion.constrain.outcomes import Outcome, OutcomeCache, Refused

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
    from vllm_diffusion.constrain.outcomes import ConstraintSource

PROCESSES: Final = 2
"""Processes that compile at once: while one is busy for long, the other serves the rest."""

CACHE_BYTES: Final = 256 << 20


class CompilePool:
    """Compiles constraints in processes of their own; may be shared by threads.

    Args:
        processes: the most that run at once; each starts when it is first needed.
        cache_bytes: memory for outcomes.
        seconds, memory: limits for one constraint, see ``CompileProcess``.
    """

    def __init__(
        self,
        *,
        processes: int = PROCESSES,
        cache_bytes: int = CACHE_BYTES,
        **limits: int,
    ) -> None:
        self.cache = OutcomeCache(cache_bytes)
        self._processes = [CompileProcess(**limits) for _ in range(processes)]
        self._lanes: list[Thread] = []
        self._idle = 0
        self._changed = Condition()
        self._queue: list[tuple[int, int, str]] = []
        self._order = count()
        self._jobs: dict[str, tuple[Job, Vocabulary]] = {}
        self._waiting: dict[str, list[Future[Outcome]]] = {}
        self._ended = False

    def submit(
        self, source: ConstraintSource, vocabulary: Vocabulary, *, room: int | None = None
    ) -> Future[Outcome]:
        """A future of the constraint's outcome; it never holds an exception.

        Args:
            source, room: as for ``outcome_of``.
            vocabulary: as for ``outcome_of``; do not change it afterwards.

        Returns:
            A future of the caller's own: cancelling it affects nobody else.
        """
        future: Future[Outcome] = Future()
        name = _name(source, vocabulary.fingerprint)
        in_room = f"{name} in {room}"
        with self._changed:
            if (known := self.cache.get(name) or self.cache.get(in_room)) is not None:
                future.set_result(known)
                return future
            self._waiting.setdefault(in_room, []).append(future)
            if in_room not in self._jobs:
                job = Job(source=source, vocabulary=vocabulary.fingerprint, room=room)
                self._jobs[in_room] = job, vocabulary
                heappush(self._queue, (job.size, next(self._order), in_room))
                self._add_lane()
                self._changed.notify()
        return future

    def kept(
        self, source: ConstraintSource, vocabulary: Vocabulary, *, room: int | None = None
    ) -> Outcome | None:
        """The cached outcome of a constraint, if there is one."""
        name = _name(source, vocabulary.fingerprint)
        return self.cache.get(name) or self.cache.get(f"{name} in {room}")

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        return [process.pid for process in self._processes if process.pid is not None]

    def end(self) -> None:
        """End the processes; constraints that are not compiled yet are refused."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        for process in self._processes:
            process.end()
        for lane in self._lanes:
            lane.join()

    def _add_lane(self) -> None:
        """Start another process if more constraints are queued than processes are idle."""
        if self._idle >= len(self._queue) or len(self._lanes) == len(self._processes):
            return
        process = self._processes[len(self._lanes)]
        self._lanes.append(Thread(target=self._run, args=(process,), daemon=True))
        self._lanes[-1].start()

    def _run(self, process: CompileProcess) -> None:
        while (name := self._next()) is not None:
            job, vocabulary = self._jobs[name]
            try:
                outcome = process.run(job, vocabulary)
            except Exception as error:  # noqa: BLE001 -- those who wait must be told
                outcome = Refused(message=f"The constraint cannot be compiled: {error!r}")
            self._answer(name, outcome)

    def _next(self) -> str | None:
        """The shortest constraint that somebody waits for; None when the pool ends."""
        with self._changed:
            self._idle += 1
            while True:
                if self._ended:
                    break
                if not self._queue:
                    self._changed.wait()
                    continue
                name = heappop(self._queue)[-1]
                if not all(future.cancelled() for future in self._waiting[name]):
                    self._idle -= 1
                    return name
                del self._jobs[name], self._waiting[name]
            for name in [*self._jobs]:
                self._tell(name, Refused(message="The server is shutting down."))
        return None

    def _answer(self, name: str, outcome: Outcome) -> None:
        with self._changed:
            if not self._ended:
                # A refusal may hold for this room alone.
                only_here = isinstance(outcome, Refused) or outcome.in_room
                self.cache.put(name if only_here else name.partition(" in ")[0], outcome)
            self._tell(name, outcome)

    def _tell(self, name: str, outcome: Outcome) -> None:
        # At the end of the pool, whoever waits for a job that runs is told before it is done.
        self._jobs.pop(name, None)
        for future in self._waiting.pop(name, ()):
            if future.set_running_or_notify_cancel():
                future.set_result(outcome)


def _name(source: ConstraintSource, fingerprint: str) -> str:
    """A name that is equal for equal constraints and vocabularies."""
    digest = hashlib.blake2b(source.text.encode("utf-8", "surrogatepass"), digest_size=16)
    others = (
        source.kind,
        source.any_whitespace,
        source.whitespace_pattern,
        source.tool_form,
        source.end_ids,
        fingerprint,
    )
    digest.update(repr(others).encode())
    return digest.hexdigest()
