"""The tables that scripts/gpu-dry ends with, in Markdown, from the reports of its jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gpu_dry.jobs import COUNTED, FAMILIES, reference_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Reports = "Mapping[str, dict[str, Any]]"


def of(reports: Reports) -> Iterator[str]:
    """Whatever the reports have, one line after the other."""
    for table in (_budgets, _choices, _kernels, _values, _options):
        lines = list(table(reports))
        if len(lines) > 2:
            yield ""
            yield from lines


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*("---" for _ in cells))


def _runs(reports: Reports, kind: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for job, report in reports.items():
        if job.startswith(kind):
            for run, found in report["runs"].items():
                yield job.removeprefix(kind), run, found


def _budgets(reports: Reports) -> Iterator[str]:
    """Ours and native's, per denoising step."""
    yield from _head(
        *("GPU", "canvases", "of", "waits", "launches beside the forward"),
        *("kernels beside it", "head", "prepare_attn", "prepare_inputs", "sampler", "runner"),
    )
    for kind, name in (("shapes-", "ours"), ("native-", "native")):
        for gpu, run, found in _runs(reports, kind):
            if run not in {"bf16-text", *FAMILIES}:
                continue
            of = f"{name}, {run}" if run in FAMILIES else name
            for count in map(str, COUNTED):
                if count in found.get("canvases", ()):
                    yield _row(gpu, count, of, *_costs(found["canvases"][count]))
            fused = [step for step in found.get("fused", ()) if step["steps"] == 1]
            if fused:  # the dearest, behind the step of the prompt
                dearest = max(fused[1:], key=lambda step: step["launches"]["all"])
                yield _row(gpu, f"{count}, a commit beside one", name, *_costs(dearest))


def _costs(steps: Mapping[str, Any]) -> Iterator[str]:
    def a_step(what: str, *regions: str) -> float:
        first, *others = (steps[what][region] / steps["steps"] for region in regions)
        return first - sum(others)

    yield f"{sum(steps['waits'].values()) / steps['steps']:g}"
    yield f"{a_step('launches', 'all', 'forward'):g}"
    yield f"{a_step('kernels', 'all', 'forward'):g}"
    inside = "prepare_attn", "prepare_inputs", "sampler"
    for region in ("head", *inside):
        yield f"{a_step('kernels', region):g}"
    yield f"{a_step('kernels', 'all', 'forward', *inside):g}"


def _choices(reports: Reports) -> Iterator[str]:
    yield from _head("GPU", "form", "attention", "experts", "linear", "seconds", "not run")
    for gpu, run, found in _runs(reports, "shapes-"):
        if "error" in found:
            yield _row(gpu, run, found["error"].strip().splitlines()[-1][:120])
        else:
            names = (", ".join(found[kind]) for kind in ("attention", "experts", "linear"))
            yield _row(gpu, run, *names, found["seconds"], ", ".join(found["left out"]))


def _kernels(reports: Reports) -> Iterator[str]:
    yield from _head("kernel", "target", "registers", "spilled", "shared", "warps", "whose")
    fields = "name", "target", "registers", "spilled", "shared", "warps"
    rows = {
        (*(kernel[field] for field in fields), "ours" if kernel["ours"] else "vLLM's")
        for job, report in reports.items()
        if job.startswith("shapes-")
        for kernel in report["kernels"]
        if kernel["ours"] or kernel["spilled"]
    }
    for row in sorted(rows):
        yield _row(*row)


def _values(reports: Reports) -> Iterator[str]:
    yield from _head("run", "attention", "equal tokens", "replays", "pushed out", "seconds")
    for job, report in reports.items():
        if job.startswith("values-") and "replays" in report and job != "values-options":
            expected = reports.get(reference_of(job), {}).get("answers", {})
            pairs = [
                pair
                for name, answer in report["answers"].items()
                if name in expected
                for pair in zip(answer["tokens"], expected[name]["tokens"], strict=False)
            ]
            equal = f"{sum(a == b for a, b in pairs)} / {len(pairs)}"
            counts = report["replays"], report["preemptions"], report["seconds"]
            yield _row(job.removeprefix("values-"), *report["attention"], equal, *counts)


def _options(reports: Reports) -> Iterator[str]:
    yield from _head("asked alone", "steps", "waits a step", "for")
    for asked in reports.get("values-options", {}).get("rounds", []):
        waits = asked["waits"]
        each = f"{sum(waits.values()) / asked['steps']:.3g}"
        yield _row(*asked["names"], asked["steps"], each, ", ".join(waits))
