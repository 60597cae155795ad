"""Fixtures of the tests that run an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from helpers.oracle import Oracle
from helpers.parity import conditioned_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def parity_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on which two correct engines agree to the token; see ``helpers.parity``."""
    return conditioned_checkpoint(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="session")
def oracle(parity_checkpoint: Path) -> Oracle:
    """Transformers on ``parity_checkpoint``."""
    return Oracle(parity_checkpoint)
