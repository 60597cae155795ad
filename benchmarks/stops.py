"""Upper bound of what a stop rule could save, and the cost of two simple ones, on recorded traces.

    VLLM_DIFFUSION_TRACE=DIR python benchmarks/quality.py --preset reference ...
    python benchmarks/stops.py DIR

Stops do not change what a canvas goes through before they end it, so a recording tells what each
would have done. `oracle` ends a canvas with the first step from which on no token of its argmax
changes. `entropy` ends it where its summed entropy is below 0.2 nat, `no overturn` where also no
position had another argmax with more than half of the probability the step before. `ended
otherwise` counts the canvases that would have had other tokens than they came to have.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import _report
import numpy as np

from vllm_diffusion.trace.file import load

if TYPE_CHECKING:
    from vllm_diffusion.trace.file import Canvas

NATS, MAJORITY = 0.2, 0.5


def main() -> None:
    """Read a folder of traces and print every stop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    files = sorted(parser.parse_args().folder.glob("*.npz"))
    canvases = [c for file in files for c in load(file).canvases if c.tokens is not None]
    recorded = [len(canvas.steps) for canvas in canvases]
    rows = []
    for name, stop in STOPS.items():
        ends = [stop(canvas) for canvas in canvases]
        wrong = [
            not np.array_equal(canvas.steps[end].argmax, canvas.tokens)
            for canvas, end in zip(canvases, ends, strict=True)
        ]
        steps = sum(ends) + len(ends)
        rows.append(
            {
                "stop": name,
                "canvases": len(canvases),
                "steps": steps,
                "longest": max(ends) + 1,
                "ended otherwise %": 100 * float(np.mean(wrong)),
                "recorded steps / steps": sum(recorded) / steps,
                "with a commit each": (sum(recorded) + len(canvases)) / steps,
            }
        )
    _report.print_table(rows)


def published(canvas: Canvas) -> int:
    """Its last step, as it was recorded."""
    return len(canvas.steps) - 1


def oracle(canvas: Canvas) -> int:
    """The first step from which on the argmax is what the canvas ends with."""
    last = len(canvas.steps) - 1
    while last and np.array_equal(canvas.steps[last - 1].argmax, canvas.tokens):
        last -= 1
    return last


def entropy(canvas: Canvas, *, overturns: bool = True) -> int:
    """The first step with little entropy left, and nothing overturned unless that may be."""
    for number, step in enumerate(canvas.steps):
        before = canvas.steps[number - 1] if number else step
        overturned = (step.argmax != before.argmax) & (before.top_prob > MAJORITY)
        if step.entropy.sum() < NATS and (overturns or not overturned.any()):
            return number
    return len(canvas.steps) - 1


STOPS = {
    "published": published,
    "oracle": oracle,
    "entropy": entropy,
    "no overturn": lambda canvas: entropy(canvas, overturns=False),
}


if __name__ == "__main__":
    main()
