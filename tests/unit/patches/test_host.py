from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from vllm_diffusion.patches import host
from vllm_diffusion.upstream import ledger


def test_a_hidden_package_counts_as_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio", None)  # put back what was there afterwards
    host.hide_torchaudio()
    assert importlib.util.find_spec("torchaudio") is None
    with pytest.raises(ImportError):
        importlib.import_module("torchaudio")


def test_transformers_looks_again_after_hiding(monkeypatch):
    cleared: list[str] = []
    fake = types.ModuleType("transformers.utils.import_utils")
    probe = types.SimpleNamespace(cache_clear=lambda: cleared.append("torchaudio"))
    monkeypatch.setattr(fake, "is_torchaudio_available", probe, raising=False)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    host.hide_torchaudio()
    assert cleared == ["torchaudio"]


def test_declaring_the_operators_is_repeatable_and_they_exist():
    host.declare_torchvision_ops()
    host.declare_torchvision_ops()
    for name in host.MISSING_OPS:
        assert hasattr(torch.ops.torchvision, name)


def test_an_error_never_reaches_the_import_of_torch(monkeypatch):
    def fail(_: object) -> None:
        raise RuntimeError("broken row")

    monkeypatch.setattr(ledger, "apply", fail)
    host.prepare_host()
