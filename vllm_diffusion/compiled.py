"""The C++ parts of this package: built with it where there is a compiler, loaded by pointer.

They have no torch and no Python in them, so one build fits every torch. Threads are those of torch,
which brings the OpenMP runtime.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import logging


def load(folder: Path, name: str, *, part: str, logger: logging.Logger) -> ctypes.CDLL | None:
    """The library ``name`` built into ``folder``; None, with one line in the log, without it.

    Args:
        folder: beside the module that calls it.
        name: of the extension in pyproject.toml.
        part: what it is a part of, for the log: "the head".
        logger: of the module that calls it.
    """
    built = sorted(folder.glob(f"{name}.*so"))
    if not built:
        logger.info(
            "The C++ part of %s is not built, so its torch form runs, which is slower on a CPU. "
            "To build it: install a C++ compiler and install vllm-diffusion again.",
            part,
        )
        return None
    try:
        # Our code calls the OpenMP runtime that torch has loaded, whose threads are bound to cores
        # already; a second runtime would bring threads of its own.
        runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
        ctypes.CDLL(str(runtimes[0]) if runtimes else "libgomp.so.1", ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(built[0]))
    except OSError as error:
        logger.warning("The C++ part of %s cannot be loaded, its torch form runs: %s", part, error)
        return None
