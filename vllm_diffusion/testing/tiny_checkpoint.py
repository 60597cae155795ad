"""Make a checkpoint with random weights: `... tiny_checkpoint --family NAME DIR`.

Every other option is a field of the `TinySpec` in that family's `testing/checkpoint.py`;
`--family NAME --help` lists them.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from vllm_diffusion.testing.families import families, part_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; prints the path and the size of what was written."""
    choice = _family_option()
    maker = part_of(choice.parse_known_args(arguments)[0].family, "checkpoint")
    options = vars(_parser(choice, maker.TinySpec).parse_args(arguments))
    del options["family"]
    directory = maker.make_tiny_checkpoint(options.pop("directory"), maker.TinySpec(**options))
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{directory} ({size / 1e6:.1f} MB)")
    return 0


def _family_option() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--family", choices=families(), required=True)
    return parser


def _parser(family: argparse.ArgumentParser, spec: Any) -> argparse.ArgumentParser:  # noqa: ANN401 -- a family's dataclass
    """A parser with an option for every field of a spec."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_diffusion.testing.tiny_checkpoint",
        description="Make a checkpoint with random weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[family],
    )
    parser.add_argument("directory", type=Path, help="where to write it")
    defaults, types = spec(), get_type_hints(spec)
    for field in fields(spec):
        option = "--" + field.name.replace("_", "-")
        default = getattr(defaults, field.name)
        if isinstance(default, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=default)
        elif isinstance(default, str):
            parser.add_argument(option, choices=get_args(types[field.name]), default=default)
        else:
            parser.add_argument(option, type=int, default=default, metavar="N")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
