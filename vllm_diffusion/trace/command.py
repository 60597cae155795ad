"""`python -m vllm_diffusion.trace FILE...`: show a recorded trace on one screen.

Only ``run`` imports torch: the command line and `doctor` must work where torch cannot be imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vllm_diffusion.errors import TraceError

if TYPE_CHECKING:
    import argparse

    from vllm_diffusion.trace.file import Canvas, Step, Trace
    from vllm_diffusion.trace.replay import ReplayedCanvas

SUMMARY: Final = "show recorded traces (VLLM_DIFFUSION_TRACE=DIR) and replay the rule on them"

_ROWS: Final = 30  # most canvases shown per file
_SAMPLES: Final = 6  # most steps shown per canvas, evenly spaced, including first and last


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="a recorded request, .npz")
    parser.add_argument(
        "--replay",
        action="store_true",
        help="replay the recorded rule and compare; exit status 1 if they differ",
    )


def run(options: argparse.Namespace) -> int:
    """Print every file; 1 if one cannot be read or its replay differs, else 0."""
    from vllm_diffusion.trace.file import load
    from vllm_diffusion.trace.replay import replay

    status = 0
    for path in options.files:
        try:
            trace = load(path)
        except (OSError, TraceError) as error:
            print(error)
            status = 1
            continue
        print(_header(path, trace))
        replayed = replay(trace) if options.replay else None
        canvases = trace.canvases
        print(_TITLE + ("  replay" if replayed else ""))
        for number, canvas in enumerate(canvases[:_ROWS]):
            verdict = f"  {_verdict(replayed.canvases[number])}" if replayed else ""
            print(_row(number, canvas) + verdict)
        if len(canvases) > _ROWS:
            print(f"... and {len(canvases) - _ROWS} more")
        if replayed:
            reproduced = sum(canvas.reproduced for canvas in replayed.canvases)
            print(
                f"replayed: {reproduced} of {len(canvases)} canvases equal bit for bit, "
                f"{replayed.steps} denoising steps, {replayed.recorded_steps} recorded"
            )
            status |= not replayed.reproduced
        print()
    return status


_TITLE: Final = (
    f"canvas  start  width  steps  outcome      "
    f"{'mean entropy, nats':<{8 * _SAMPLES}} {'accepted':<{5 * _SAMPLES}}"
)


def _header(path: str, trace: Trace) -> str:
    from vllm_diffusion.denoise.constants import formatted

    committed = sum(canvas.width for canvas in trace.canvases if canvas.tokens is not None)
    return (
        f"{path}: request {trace.request_id!r}, seed {trace.seed}, "
        f"by vllm-diffusion {trace.plugin_version}\n"
        f"{len(trace.steps)} forwards for {committed} tokens; "
        f"{trace.vocab_size} ids, canvas of {trace.canvas_length}\n"
        f"rule: {', '.join(formatted(trace.rule).values())}"
    )


def _row(number: int, canvas: Canvas) -> str:
    shown = _evenly_spaced(canvas.steps)
    entropy = "".join(f"{step.entropy.mean():<8.2g}" for step in shown)
    accepted = "".join(f"{int(step.accepted.sum()):<5}" for step in shown)
    return (
        f"{number:>6}  {canvas.start:>5}  {canvas.width:>5}  {len(canvas.steps):>5}  "
        f"{_outcome(canvas):<11}  {entropy:<{8 * _SAMPLES}} {accepted:<{5 * _SAMPLES}}"
    )


def _outcome(canvas: Canvas) -> str:
    if canvas.tokens is not None:
        return "committed" if canvas.commit is not None else "emitted"
    return "finished" if canvas.finished else "interrupted"


def _evenly_spaced(steps: tuple[Step, ...]) -> list[Step]:
    last = len(steps) - 1
    return [steps[index] for index in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)})]


def _verdict(canvas: ReplayedCanvas) -> str:
    if canvas.reproduced:
        return "the same"
    told = ["no stop" if canvas.censored else f"stops after {canvas.steps}"]
    if canvas.diverged is not None:
        told.append(f"accepts others from step {canvas.diverged}")
    elif not canvas.on_trajectory:
        told.append("other inputs")
    if canvas.same_tokens is False:
        told.append("other tokens")
    return ", ".join(told)
