"""Compiling in a separate process with limits on time and memory.

A constraint takes up to seconds of Python, which would block everything else in the process. In a
process of its own the kernel divides the time, and a crash ends nothing else. The process is an
interpreter without vLLM, and without torch until a constraint needs a parser. It communicates over
its standard input and output, and exits when they close.
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
"""Processor time that a constraint may take."""

MEMORY: Final = 2 << 30
"""Bytes that a constraint may take, on top of what the process had before."""

_TIDY: Final = 1 << 30
"""Bytes of resident memory above which a process is not used again."""

_NICENESS: Final = 5
"""Processes that generate text come before those that compile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A constraint to compile."""

    source: ConstraintSource
    vocabulary: str
    """Fingerprint of the vocabulary to compile for."""
    room: int | None = None
    """See ``outcome_of``."""

    @property
    def size(self) -> int:
        """Length of the text: an estimate of how long compiling takes."""
        return len(self.source.text)


class CompileProcess:
    """One process, started with the first job, and again after a job that ended it.

    Used by one thread at a time, except for ``end``.

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
        """Id of the process while it runs."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def run(self, job: Job, vocabulary: Vocabulary) -> Outcome:
        """Compile; whatever goes wrong becomes a refusal."""
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
        """End the process and start no other one."""
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
                    # -P: nothing is imported from the working directory of the server.
                    [sys.executable, "-P", "-c", program],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
            return self._process

    def _lost(self, process: subprocess.Popen[bytes]) -> Refused:
        """The refusal of a job that ended its process."""
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
        pass  # buffered data cannot be sent any more


def _named(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def main(seconds: int, memory: int) -> NoReturn:
    """The program of the process: read jobs, answer them in order."""
    os.nice(_NICENESS)
    # Ctrl-C is meant for the parent; this process exits when the parent does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Standard output is for answers alone: whatever libraries print goes to the log.
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
            os._exit(0)  # the other thread is reading


def _received(pipe: IO[bytes]) -> SimpleQueue[Any]:
    """Jobs and vocabularies. Exits with the parent, in the middle of a job if need be."""
    received: SimpleQueue[Any] = SimpleQueue()

    def read() -> None:
        while True:
            try:
                received.put(pickle.load(pipe))  # noqa: S301 -- from our parent
            except (EOFError, OSError):
                os._exit(0)

    Thread(target=read, daemon=True).start()
    return received


def _limit(seconds: int, memory: int) -> None:
    """Set the limits of the next job, which the kernel enforces."""
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
