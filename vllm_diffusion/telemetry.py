"""Telemetry of a request: forwards, rows, and the steps of each canvas.

    worker       steps, stop reason and entropy of a committed canvas (``engine.telemetry``)
    scheduler    Meter counts every forward; a Report leaves with the request's tokens
    front end    Telemetry collects the reports of one answer

Plain numbers in and out; no vLLM, no tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

OPTION: Final = "diffusion_telemetry"
"""The request option that asks for telemetry."""

KEY: Final = "diffusion"
"""Key of the telemetry, both inside vLLM's objects and in an answer."""


def is_asked(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a client's request asks for its telemetry."""
    return bool((extra_args or {}).get(OPTION))


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasReport:
    """A committed canvas."""

    steps: int
    """Denoising steps it took."""
    stopped_by: str
    """Name of its ``records.StopReason`` in lower case."""
    entropy: float | None
    """Mean entropy of its last step, nats; None where the model gave no number."""
    tokens: int
    """Tokens it committed, including those after the end of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a request ran since its last report."""

    asked: bool
    """Whether the request asked for it; otherwise it is only for the metrics."""
    denoise_forwards: int
    """Includes fused forwards, which also commit the previous canvas."""
    commit_forwards: int
    rows: int
    """Total over all these forwards."""
    canvas: CanvasReport | None
    """None where the request ended without committing one."""

    def to_wire(self) -> list[Any]:
        """A flat list of numbers and strings, for vLLM's serializer."""
        head = [self.asked, self.denoise_forwards, self.commit_forwards, self.rows]
        canvas = self.canvas
        if canvas is None:
            return head
        return [*head, canvas.steps, canvas.stopped_by, canvas.entropy, canvas.tokens]

    @staticmethod
    def from_wire(wire: list[Any]) -> Report:
        """Read what ``to_wire`` returned."""
        asked, denoise, commit, rows, *rest = wire
        canvas = None
        if rest:
            steps, stopped_by, entropy, tokens = rest
            canvas = CanvasReport(
                steps=steps, stopped_by=stopped_by, entropy=entropy, tokens=tokens
            )
        return Report(
            asked=asked,
            denoise_forwards=denoise,
            commit_forwards=commit,
            rows=rows,
            canvas=canvas,
        )


@dataclass(slots=True)
class Telemetry:
    """One answer; grows with every report until the answer is complete."""

    canvases: list[CanvasReport] = field(default_factory=list)
    denoise_forwards: int = 0
    commit_forwards: int = 0
    rows: int = 0

    def add(self, report: Report) -> None:
        """Add a report."""
        self.denoise_forwards += report.denoise_forwards
        self.commit_forwards += report.commit_forwards
        self.rows += report.rows
        if report.canvas is not None:
            self.canvases.append(report.canvas)

    @property
    def forwards(self) -> int:
        """All forwards after the prompt's."""
        return self.denoise_forwards + self.commit_forwards

    def as_dict(self) -> dict[str, Any]:
        """The telemetry as an HTTP answer shows it."""
        return {
            "canvases": [asdict(canvas) for canvas in self.canvases],
            "denoise_forwards": self.denoise_forwards,
            "commit_forwards": self.commit_forwards,
            "rows": self.rows,
        }


@dataclass(frozen=True, slots=True)
class IterationReports:
    """What the metrics learn of one batch of outputs."""

    reports: list[Report] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)
    """Tokens and forwards of every answer that is complete."""


@dataclass(slots=True)
class _Count:
    asked: bool
    denoise: int = 0
    commit: int = 0
    rows: int = 0


class Meter:
    """Counts the forwards of every request since its last report."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}

    def ran(self, request_id: str, *, rows: int, commits: bool, asked: bool) -> None:
        """Count one forward of the request, which either commits a canvas or denoises one."""
        count = self._counts.get(request_id)
        if count is None:
            count = self._counts[request_id] = _Count(asked)
        count.rows += rows
        if commits:
            count.commit += 1
        else:
            count.denoise += 1

    def report(self, request_id: str, canvas: CanvasReport | None) -> Report | None:
        """The report since the last one, None if nothing ran.

        Args:
            request_id: the request whose output leaves.
            canvas: the canvas it committed, None if it committed none.
        """
        count = self._counts.pop(request_id, None)
        if count is None:
            return None
        return Report(
            asked=count.asked,
            denoise_forwards=count.denoise,
            commit_forwards=count.commit,
            rows=count.rows,
            canvas=canvas,
        )

    def keep(self, request_ids: Collection[str]) -> None:
        """Drop the counts of all requests but these."""
        for request_id in self._counts.keys() - request_ids:
            del self._counts[request_id]
