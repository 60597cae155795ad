"""Collected only where scripts/gpu-dry runs it; prints its tables at the end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from gpu_dry import tables
from gpu_dry.jobs import JOBS, Pool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The ordinary environment has no CUDA wheel.
collect_ignore_glob = [] if os.environ.get("GPU_DRY_RUN") else ["test_*.py"]

_POOL = pytest.StashKey[Pool]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the jobs that the tests need, in their order."""
    if session.config.option.collectonly or not session.items:
        return
    pool = Pool(session.config._tmp_path_factory.mktemp("gpu_dry"))
    session.config.stash[_POOL] = pool
    for item in session.items:
        for mark in item.iter_markers("jobs"):
            for name in mark.args:
                pool.start(name)
        name = getattr(item, "callspec", None) and item.callspec.params.get("job")
        if name in JOBS:
            pool.start(name)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Iterator[Callable[[str], dict[str, Any]]]:
    """`report(job)`: what a job of `jobs.JOBS` wrote down."""
    pool = request.config.stash[_POOL]
    yield pool.report
    pool.close()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if (pool := config.stash.get(_POOL, None)) is not None:
        for line in tables.of(pool.finished()):
            terminalreporter.write_line(line)
