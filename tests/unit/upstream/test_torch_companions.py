from __future__ import annotations

import sys
import types

import pytest
import torch

from vllm_diffusion.upstream import torch_companions


@pytest.fixture
def companion(monkeypatch, tmp_path):
    """An installed companion called `torchaudio`, whose library loads as one says."""

    def install(*, library: bool = True, loads: bool = True, gpu: bool = False) -> list[str]:
        folder = tmp_path / "torchaudio"
        (folder / "lib").mkdir(parents=True)
        if library:
            (folder / "lib" / "_torchaudio.abi3.so").touch()
        tried: list[str] = []

        def load(path: str) -> None:
            tried.append(path)
            if not loads:
                raise OSError("libc10_cuda.so: cannot open shared object file")

        spec = types.SimpleNamespace(submodule_search_locations=[str(folder)])
        monkeypatch.setattr(torch_companions, "find_spec", lambda _: spec)
        monkeypatch.setattr(torch.ops, "load_library", load)
        monkeypatch.setattr(torch.version, "cuda", "13.0" if gpu else None)
        monkeypatch.setattr(torch.version, "hip", None, raising=False)
        monkeypatch.delitem(sys.modules, "torchaudio", raising=False)
        return tried

    return install


def test_a_library_that_does_not_load_is_found_out_by_loading_it(companion):
    tried = companion(loads=False)
    assert torch_companions.cannot_load("torchaudio")
    assert len(tried) == 1


def test_a_healthy_installation_is_left_alone(companion):
    tried = companion()
    assert not torch_companions.cannot_load("torchaudio")
    assert len(tried) == 1


def test_a_gpu_build_is_left_alone_without_loading_anything(companion):
    assert companion(loads=False, gpu=True) == []
    assert not torch_companions.cannot_load("torchaudio")


def test_a_companion_without_its_library_is_left_alone(companion):
    companion(library=False, loads=False)
    assert not torch_companions.cannot_load("torchaudio")


def test_an_imported_companion_is_left_alone(companion, monkeypatch):
    companion(loads=False)
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    assert not torch_companions.cannot_load("torchaudio")


def test_a_companion_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(torch_companions, "find_spec", lambda _: None)
    monkeypatch.delitem(sys.modules, "torchcodec", raising=False)
    assert not torch_companions.cannot_load("torchcodec")
