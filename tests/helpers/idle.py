"""Waits until a server has nothing left to do, as its own metrics tell it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_diffusion.testing.server import Server


def wait_until_idle(server: Server, seconds: float = 20.0) -> None:
    """No request runs or waits, no memory is held."""
    deadline = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        busy = {
            name: metrics[name]
            for name in (
                "vllm:num_requests_running",
                "vllm:num_requests_waiting",
                "vllm:kv_cache_usage_perc",
            )
            if metrics[name]
        }
        if not busy:
            return
        assert time.monotonic() < deadline, f"never idle again: {busy}"
        time.sleep(0.1)
