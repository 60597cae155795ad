"""The command `vllm-diffusion`: one table of subcommands.

Serving needs none of them; use `vllm serve`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from vllm_diffusion import __version__, doctor
from vllm_diffusion.trace import command as trace
from vllm_diffusion.tune import command as tune

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One subcommand. `run` returns the exit status."""

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS: Final = (
    Command(
        name="doctor",
        summary=doctor.SUMMARY,
        add_arguments=doctor.add_arguments,
        run=doctor.run,
    ),
    Command(
        name="trace",
        summary=trace.SUMMARY,
        add_arguments=trace.add_arguments,
        run=trace.run,
    ),
    Command(
        name="tune",
        summary=tune.SUMMARY,
        add_arguments=tune.add_arguments,
        run=tune.run,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status; `arguments` defaults to the command line."""
    parser = argparse.ArgumentParser(prog="vllm-diffusion", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.summary, description=command.summary
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except ImportError as error:
        print(f"{error}: run `vllm-diffusion doctor` to see what is missing")
        return 1
    return status
