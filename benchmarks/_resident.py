"""Resident memory of this process and its peak, from Linux."""

from __future__ import annotations

from pathlib import Path


def resident(field: str, *, forget_peak: bool = False) -> int:
    """KiB that this process holds (VmRSS) or has held (VmHWM)."""
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")
