"""Load the C++ libraries that are built with this package where there is a compiler.

They use neither torch nor Python, so one build works with every torch. They run on the threads of
torch's OpenMP runtime.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import logging


def load(folder: Path, name: str, *, part: str, logger: logging.Logger) -> ctypes.CDLL | None:
    """The library ``name`` in ``folder``, or None, with one line in the log.

    Args:
        folder: where the extension was built, beside the calling module.
        name: name of the extension in pyproject.toml.
        part: what it implements, for the log: "the head".
        logger: logger of the calling module.
    """
    built = sorted(folder.glob(f"{name}.*so"))
    if not built:
        logger.info(
            "The C++ part of %s is not built; its torch version runs, which is slower on a CPU. "
            "To build it, install a C++ compiler and reinstall vllm-diffusion.",
            part,
        )
        return None
    try:
        # Use the OpenMP runtime that torch has loaded, whose threads are already bound to cores; a
        # second runtime would start threads of its own.
        runtimes = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
        ctypes.CDLL(str(runtimes[0]) if runtimes else "libgomp.so.1", ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(str(built[0]))
    except OSError as error:
        logger.warning(
            "The C++ part of %s cannot be loaded; its torch version runs: %s", part, error
        )
        return None
