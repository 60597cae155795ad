"""Fixtures that every test may use; what they do is in `helpers/` and `vllm_diffusion/testing/`."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Protocol

import pytest
from helpers.engines import SERVER_OPTIONS, EnginePool

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, make_tiny_checkpoint
from vllm_diffusion.testing.server import Server, serve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from openai import OpenAI
    from vllm import LLM


class EngineFactory(Protocol):
    """`engine(checkpoint=None, in_process=True, **options)`: an `LLM`, shared between tests."""

    def __call__(
        self, checkpoint: Path | None = None, *, in_process: bool = True, **options: Any
    ) -> LLM: ...


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`make_checkpoint(hidden=96, ...)`: fields of `TinySpec`; each spec is made once a session."""
    made: dict[TinySpec, Path] = {}

    def make(**fields: Any) -> Path:
        spec = TinySpec(**fields)
        if spec not in made:
            made[spec] = make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), spec)
        return made[spec]

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """The random checkpoint at its default size; takes text and images."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def engine_pool() -> Iterator[EnginePool]:
    """Closed at the end of the session; tests ask `engine` instead."""
    pool = EnginePool()
    yield pool
    pool.close()
    gc.unfreeze()  # or modules of C++ report as leaked what is never collected


@pytest.fixture
def engine(engine_pool: EnginePool, tiny_checkpoint: Path) -> EngineFactory:
    """Start or reuse an engine with the plugin in it; see `EngineFactory`."""

    def get(checkpoint: Path | None = None, *, in_process: bool = True, **options: Any) -> LLM:
        return engine_pool.get(checkpoint or tiny_checkpoint, in_process=in_process, **options)

    return get


@pytest.fixture(scope="session")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    """`vllm serve` on the tiny checkpoint with the plugin in it, once a session."""
    with serve(tiny_checkpoint, *SERVER_OPTIONS, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[OpenAI]:
    """An `openai` client of `server`; the model is called `tiny`. Errors are not retried."""
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this host cannot run, with the reason."""
    for marker, reason in (("gpu", _no_gpu), ("vllm", _no_vllm), ("server", _no_vllm)):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (why := reason()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=why))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none"


def _no_vllm() -> str | None:
    from importlib.util import find_spec

    return None if find_spec("vllm") else "needs vLLM: install the extra cpu or cuda"
