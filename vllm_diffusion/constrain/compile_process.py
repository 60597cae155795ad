"""Compiling in a process of its own, which may take only so much time and memory.

A constraint takes up to seconds of Python, in which nobody else of its process would get a turn; in
a process of its own the kernel shares the time out, and whatever ends it ends nothing else. It is
an interpreter without vLLM, and without torch until a constraint needs a parser. It is spoken to by
its standard input and output, and leaves when they close.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn

from vllm_diffusion.constrain.outcomes import ConstraintSource, Outcome, Refused, outcome_of

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary

SECONDS: Final = 30
"""Of the processor that a constraint may take."""

MEMORY: Final = 2 << 30
"""Bytes that a constraint may take beside what the process had before."""

_TIDY: Final = 1 << 30
"""Bytes with which a process is not used again."""

_NICENESS: Final = 5
"""Those who write come before those who compile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be compiled."""

    source: ConstraintSource
    vocabulary: str
    """Fingerprint of the one that it is compiled for."""
    room: int | None = None
    """See ``outcome_of``."""

    @property
    def size(self) -> int:
        """What tells short ones from long ones before anything is known of them."""
        return len(self.source.text)


class CompileProcess:
    """One process, made with the first job and again after one that it did not survive.

    Used by one thread at a time, but for ``end``.

    Args:
        seconds: see ``SECONDS``.
        memory: see ``MEMORY``.
    """

    def __init__(self, *, seconds: int = SECONDS, memory: int = MEMORY) -> None:
        self._seconds = seconds
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._knows: str | None = None
        self._ended = False
        self._lock = Lock()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def run(self, job: Job, vocabulary: Vocabulary) -> Outcome:
        """Compile, however it ends."""
        process = self._started()
        if process is None:
            return Refused(message="The server is shutting down.")
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if self._knows != job.vocabulary:
                pickle.dump(vocabulary, process.stdin)
                self._knows = job.vocabulary
            pickle.dump(job, process.stdin)
            process.stdin.flush()
            outcome: Outcome = pickle.load(process.stdout)  # noqa: S301 -- our own process
        except (EOFError, OSError, pickle.UnpicklingError):
            return self._lost(process)
        return outcome

    def end(self) -> None:
        """End the process and start no other."""
        with self._lock:
            self._ended = True
            if self._process is not None:
                self._process.kill()

    def _started(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._ended:
                return None
            if self._process is None or self._process.poll() is not None:
                program = f"from {__name__} import main; main({self._seconds}, {self._memory})"
                self._knows = None
                self._process = subprocess.Popen(  # noqa: S603 -- our own program
                    # -P: what lies in the folder of the server is not to be imported.
                    [sys.executable, "-P", "-c", program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            return self._process

    def _lost(self, process: subprocess.Popen[bytes]) -> Refused:
        """What is said of a job that its process did not survive."""
        process.kill()
        status = process.wait()
        for pipe in (process.stdin, process.stdout):
            _close(pipe)
        if self._ended:
            return Refused(message="The server is shutting down.")
        if status == -signal.SIGXCPU:
            return Refused(
                message=f"The constraint takes longer to compile than the {self._seconds} seconds "
                "that it may. Shorten its bounds, name fewer properties, or split it."
            )
        return Refused(
            message="The constraint cannot be compiled: the process that did so ended with "
            f"{_named(status)}, perhaps since it took more memory than it may."
        )


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:
        pass  # what was left to be sent cannot be


def _named(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def main(seconds: int, memory: int) -> NoReturn:
    """What the process does: read jobs, answer them in their order."""
    os.nice(_NICENESS)
    # Meant for whoever started us, at whose end we leave.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Whoever prints, prints to the log: the answers have the pipe for themselves.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    vocabulary: Vocabulary | None = None
    received = _received(sys.stdin.buffer)
    while True:
        asked = received.get()
        if not isinstance(asked, Job):
            vocabulary = asked
            continue
        assert vocabulary is not None
        _limit(seconds, memory)
        try:
            outcome = outcome_of(asked.source, vocabulary, room=asked.room)
        except BaseException as error:  # noqa: BLE001 -- extension modules raise panics
            outcome = Refused(message=f"The constraint cannot be compiled: {error!r}")
        pickle.dump(outcome, answers)
        answers.flush()
        if _resident() > _TIDY:
            os._exit(0)  # whose other thread reads


def _received(pipe: IO[bytes]) -> SimpleQueue[Any]:
    """Jobs and vocabularies. Leaves with whoever sent them, in the middle of a job if need be."""
    received: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        while True:
            try:
                received.put(pickle.load(pipe))  # noqa: S301 -- whoever started us
            except (EOFError, OSError):
                os._exit(0)

    Thread(target=read, daemon=True).start()
    return received


def _limit(seconds: int, memory: int) -> None:
    """Give the next job its time and memory; the kernel holds it to them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    end = int(used.ru_utime + used.ru_stime) + seconds
    _, hardest = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (end, hardest))
    _, hardest = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_pages(0) + memory, hardest))


def _resident() -> int:
    return _pages(1)


def _pages(field: int) -> int:
    """Bytes of address space (0) or memory (1) of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(pages[field]) * resource.getpagesize()
