"""Which form of the tile epilogue runs on a GPU; the form itself is tested in tests/ops."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from vllm_diffusion.errors import ConfigError
from vllm_diffusion.head import cuda, reading

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

on_a_gpu = SimpleNamespace(is_cuda=True)


@pytest.fixture
def installed_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in the place of the one that holds the built library."""
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "cuda.py"))
    monkeypatch.delenv(cuda.VARIABLE, raising=False)
    library = cuda.library
    library.cache_clear()
    yield tmp_path
    library.cache_clear()


@pytest.mark.usefixtures("installed_in")
@pytest.mark.parametrize("value", [None, "", "triton"])
def test_triton_runs_on_gpus(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    fused = pytest.importorskip("vllm_diffusion.head.fused", reason="no Triton here")
    if value is not None:
        monkeypatch.setenv(cuda.VARIABLE, value)
    assert reading.absorb_of(on_a_gpu) is fused.absorb


@pytest.mark.usefixtures("installed_in")
def test_cuda_runs_where_it_is_built_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.VARIABLE, "cuda")
    monkeypatch.setattr(cuda, "library", object)
    assert reading.absorb_of(on_a_gpu) is cuda.absorb


@pytest.mark.usefixtures("installed_in")
def test_asking_for_what_is_not_built_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda.VARIABLE, "cuda")
    with pytest.raises(ConfigError, match=r"not built.*nvcc"):
        reading.absorb_of(on_a_gpu)


def test_a_library_that_does_not_load_is_an_error(installed_in: Path) -> None:
    (installed_in / "_row_pass_cuda.so").write_text("not a library")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        cuda.library()


def test_another_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected triton or cuda"):
        cuda.asked_for({cuda.VARIABLE: "cutlass"})
