"""The user's output of a run: the table on stdout, a progress line on stderr, no engine log.

vLLM and the processes it starts log to stdout, and the libraries they use write to stderr. All of
them inherit the file descriptors of this process, which are therefore redirected to a file.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OUT, _ERR = 1, 2
_UPDATE: Final = 10.0  # seconds between updates of a bar that is not on a terminal


@dataclass(frozen=True, slots=True)
class Screen:
    """The streams on which a run addresses the user."""

    out: TextIO
    err: TextIO
    log: Path | None
    """File of the engine's log; None if the log is shown."""

    def say(self, text: str) -> None:
        """Print a line of results."""
        print(text, file=self.out, flush=True)

    def note(self, text: str) -> None:
        """Print a line of progress."""
        print(text, file=self.err, flush=True)

    def bar(self, name: str) -> Callable[..., Any]:
        """A replacement for tqdm to pass to vLLM: a bar of this name, removed once full."""
        from tqdm import tqdm

        def make(*items: Any, **options: Any) -> Any:  # noqa: ANN401 - tqdm's own
            shown = {"desc": name, "file": self.err, "leave": False}
            if not self.err.isatty():
                shown["mininterval"] = _UPDATE
            return tqdm(*items, **(options | shown))

        return make


@contextmanager
def screen(*, verbose: bool) -> Iterator[Screen]:
    """Redirect all other output to a file until the block ends; with `verbose`, redirect nothing.

    The file is kept if the block fails, since a message then names it.
    """
    if verbose:
        yield Screen(sys.stdout, sys.stderr, None)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    handle, name = tempfile.mkstemp(prefix="vllm-diffusion-tune-", suffix=".log")
    log = Path(name)
    with os.fdopen(os.dup(_OUT), "w") as out, os.fdopen(os.dup(_ERR), "w") as err:
        os.dup2(handle, _OUT)
        os.dup2(handle, _ERR)
        os.close(handle)
        try:
            yield Screen(out, err, log)
            log.unlink()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(out.fileno(), _OUT)
            os.dup2(err.fileno(), _ERR)
