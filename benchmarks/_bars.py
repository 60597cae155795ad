"""Thresholds of a check, the findings of its stages, and the one-line verdict.

A failing stage does not stop the others: its error becomes part of the verdict, and its findings up
to then are kept.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from _report import Value

TAIL = 12
"""Lines of a failed command's output that are shown."""


class StageError(Exception):
    """A stage could not do its work; the message is one line for the verdict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A number and the limit that it must keep."""

    name: str
    value: float | None
    """None where it could not be measured, which keeps no limit."""
    limit: float
    at_least: bool = False
    """The limit is the least and not the most."""
    why_not: str = ""
    """Why it cannot be judged here, if it cannot."""

    @property
    def held(self) -> bool | None:
        """None where it is not judged."""
        if self.why_not:
            return None
        if self.value is None or math.isnan(self.value):
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def asked(self) -> str:
        """The limit in words."""
        return f"{'at least' if self.at_least else 'at most'} {self.limit:g}"


@dataclass(slots=True)
class Findings:
    """What a stage has found so far."""

    rows: list[Mapping[str, Value]] = field(default_factory=list)
    """A table."""
    values: dict[str, Value] = field(default_factory=dict)
    """For the file of results."""
    bars: list[Bar] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A question of the check."""

    name: str
    asks: str
    limit_s: float
    answer: Callable[[Findings, Bounded], None]
    """Fills in the findings; raises `StageError`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A stage that ran."""

    stage: str
    seconds: float
    found: Findings
    failure: str | None


class Bounded:
    """Runs the commands of a stage within what is left of its time."""

    def __init__(self, seconds: float, log: Path) -> None:
        self._ends = time.monotonic() + seconds
        self._seconds = seconds
        self._log = log

    def run(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """What the command prints; its errors go to the log of the stage.

        Raises:
            StageError: it failed, or the time was over. All of its processes are gone then.
        """
        left = self._ends - time.monotonic()
        if left <= 0:
            raise StageError(f"{name} did not start: the stage's {self._seconds:.0f} s were over")
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                list(command),
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", **(environment or {})},
                start_new_session=True,  # one group, for what the command starts itself
            )
            try:
                output, _ = process.communicate(timeout=left)
            except BaseException as error:  # an interrupt does not reach that group by itself
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                log.write(output)
                raise StageError(
                    f"{name} was not done when the stage's {self._seconds:.0f} s were over"
                ) from None
            if process.returncode:
                log.write(output)
        if process.returncode:
            raise StageError(f"{name} failed with status {process.returncode}")
        return output.decode(errors="replace")

    def tail(self) -> list[str]:
        """The end of what the commands had to say."""
        if not self._log.exists():
            return []
        return self._log.read_text(errors="replace").splitlines()[-TAIL:]


def run_stage(stage: Stage, folder: Path) -> Outcome:
    """Answer one question, whatever becomes of it."""
    found, bounded = Findings(), Bounded(stage.limit_s, folder / f"{stage.name}.log")
    started, failure = time.monotonic(), None
    try:
        stage.answer(found, bounded)
    except StageError as error:
        failure = str(error)
    except Exception as error:  # noqa: BLE001 - of a program, which must not cost the other stages
        failure = f"{type(error).__name__}: {error}"
    if failure is not None:
        print("\n".join(["", f"{stage.name}: {failure}", *bounded.tail()]), file=sys.stderr)
    return Outcome(
        stage=stage.name, seconds=time.monotonic() - started, found=found, failure=failure
    )


def verdict(outcomes: Iterable[Outcome]) -> tuple[str, bool]:
    """One line that says what is below its bar, and whether nothing is."""
    wrong, held, open_ = [], 0, 0
    for outcome in outcomes:
        if outcome.failure is not None:
            wrong.append(f"{outcome.stage}: {outcome.failure}")
        for bar in outcome.found.bars:
            held += bar.held is True
            open_ += bar.held is None
            if bar.held is False:
                value = "not measured" if bar.value is None else f"{bar.value:.3g}"
                wrong.append(f"{bar.name} {value}, {bar.asked}")
    rest = f"{held} bars held" + (f", {open_} not judged here" if open_ else "")
    if wrong:
        return f"BELOW ITS BAR: {'; '.join(wrong)} ({rest})", False
    return f"nothing is below its bar: {rest}", True
