"""The families that test data can be made for, and where their makers are.

A family keeps its own makers in ``vllm_diffusion/models/<family>/testing``. They are loaded by
name, so that nothing here depends on a family.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

_MODELS = Path(__file__).parents[1] / "models"


def families() -> tuple[str, ...]:
    """Names of the families that have makers."""
    return tuple(sorted(folder.parent.name for folder in _MODELS.glob("*/testing")))


def part_of(family: str, part: str) -> Any:  # noqa: ANN401 -- a module
    """A module of a family's makers, `checkpoint` say.

    Raises:
        ValueError: there is no such family.
    """
    if family not in families():
        raise ValueError(f"Expected a family of {', '.join(families())}, but got {family!r}.")
    return import_module(f"vllm_diffusion.models.{family}.testing.{part}")
