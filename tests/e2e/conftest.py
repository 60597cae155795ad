"""Fixtures of the tests that talk to a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.idle import wait_until_idle

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
