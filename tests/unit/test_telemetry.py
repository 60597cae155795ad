"""Counting forwards, and what an answer says of its canvases."""

from __future__ import annotations

import json

from vllm_diffusion.request.options import read_options
from vllm_diffusion.telemetry import OPTION, CanvasReport, Meter, Report, Telemetry, is_asked

CANVAS = CanvasReport(steps=3, stopped_by="settled", entropy=0.25, tokens=32)


def run(meter: Meter, name: str, forwards: str, *, asked: bool = True) -> None:
    """d denoises, c commits, f does both; a canvas has 32 rows."""
    for kind in forwards:
        rows = 64 if kind == "f" else 32
        meter.ran(name, rows=rows, commits=kind == "c", asked=asked)


def test_a_report_counts_what_ran_since_the_last_one():
    meter = Meter()
    run(meter, "a", "dddc")
    run(meter, "b", "dd", asked=False)
    assert meter.report("a", CANVAS) == Report(
        asked=True, denoise_forwards=3, commit_forwards=1, rows=128, canvas=CANVAS
    )
    assert meter.report("a", None) is None
    run(meter, "a", "d")
    assert meter.report("a", None) == Report(
        asked=True, denoise_forwards=1, commit_forwards=0, rows=32, canvas=None
    )
    assert meter.report("b", CANVAS) == Report(
        asked=False, denoise_forwards=2, commit_forwards=0, rows=64, canvas=CANVAS
    )


def test_a_fused_forward_is_one_with_the_rows_of_both():
    meter = Meter()
    run(meter, "a", "fdd")
    report = meter.report("a", CANVAS)
    assert report is not None
    assert (report.denoise_forwards, report.commit_forwards, report.rows) == (3, 0, 128)


def test_a_canvas_that_starts_over_counts_twice():
    meter = Meter()
    run(meter, "a", "dd")  # preempted here
    run(meter, "a", "dddc")
    report = meter.report("a", CANVAS)
    assert report is not None
    assert (report.denoise_forwards, report.commit_forwards) == (5, 1)
    assert report.canvas == CANVAS


def test_a_request_that_is_gone_is_forgotten():
    meter = Meter()
    for name in ("a", "b"):
        run(meter, name, "d")
    meter.keep({"b": None}.keys())
    assert meter.report("a", None) is None
    assert meter.report("b", None) is not None


def test_a_report_survives_the_wire():
    for canvas in (CANVAS, None):
        report = Report(asked=True, denoise_forwards=3, commit_forwards=1, rows=9, canvas=canvas)
        assert Report.from_wire(json.loads(json.dumps(report.to_wire()))) == report


def test_an_answer_adds_its_reports_up():
    told = Telemetry()
    for canvas in (CANVAS, CanvasReport(steps=48, stopped_by="steps", entropy=None, tokens=7)):
        told.add(Report(asked=True, denoise_forwards=5, commit_forwards=1, rows=6, canvas=canvas))
    told.add(Report(asked=True, denoise_forwards=2, commit_forwards=0, rows=5, canvas=None))
    assert told.forwards == 14
    assert told.as_dict() == {
        "canvases": [
            {"steps": 3, "stopped_by": "settled", "entropy": 0.25, "tokens": 32},
            {"steps": 48, "stopped_by": "steps", "entropy": None, "tokens": 7},
        ],
        "denoise_forwards": 12,
        "commit_forwards": 2,
        "rows": 17,
    }


def test_asking_is_an_option_of_a_request():
    assert is_asked({OPTION: True})
    assert is_asked({OPTION: 1})
    assert not is_asked({OPTION: 0})
    assert not is_asked({})
    assert not is_asked(None)
    assert read_options({OPTION: True})[0].telemetry
