"""torchvision, torchaudio and torchcodec built for CUDA, beside a torch built for CPU.

That is what plain pip installs on a CPU host: vLLM's CPU wheel asks for all three, and PyPI has
CUDA builds only. Their libraries cannot load there, and importing the packages raises. Beside a GPU
build of torch, and where the libraries load, there is nothing to mend.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final

LIBRARIES: Final = {
    "torchvision": "_C.*",
    "torchaudio": "lib/_torchaudio*.so",
    "torchcodec": "libtorchcodec_image*.so",
}
"""The library each package loads first when it is imported, below its folder."""


def cannot_load(name: str) -> bool:
    """Whether a package is installed beside a CPU torch and its library fails to load there.

    Found out by loading the library, not the package, just as importing the package would; one that
    loads is thereby loaded, and stays. A GPU build of torch is left alone: a companion that does
    not fit it is an installation to repair. So is a package that is already imported.
    """
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None or name in sys.modules:
        return False
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return False
    libraries = sorted(Path(spec.submodule_search_locations[0]).glob(LIBRARIES[name]))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))  # type: ignore[no-untyped-call]
    except OSError:
        return True
    return False


def fails_to_import(name: str) -> bool:
    """Whether importing a package fails in a Python of its own, without our help."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", f"import {name}"]
    result = subprocess.run(  # noqa: S603 - our own interpreter, a name from the table above
        command, env=environment, capture_output=True, check=False, timeout=120
    )
    return result.returncode != 0
