"""Fixtures of the tests that talk to a server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai import OpenAI

    from vllm_diffusion.testing.server import Server


@pytest.fixture
def serves_on(server: Server, client: OpenAI) -> Iterator[None]:
    """After the test nothing runs, no memory is held, and the server answers as before."""
    before = probe(client)
    yield
    wait_until_idle(server)
    assert probe(client) == before


def probe(client: OpenAI) -> str:
    """One canvas that a healthy server always writes alike."""
    request: dict[str, Any] = {"model": "tiny", "prompt": "the sea", "max_tokens": 32, "seed": 1}
    return client.completions.create(**request, extra_body={"ignore_eos": True}).choices[0].text


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
