"""torchvision, torchaudio and torchcodec built for CUDA, beside a torch built for CPU.

That is what plain pip installs on a CPU host: vLLM's CPU wheel asks for all three, and PyPI has
CUDA builds only. Their libraries cannot load there. torchvision tolerates that (its Python
transforms need none of it) except for two shape functions it registers for operators it assumes to
exist: `operator torchvision::nms does not exist`. Declaring the operators, without implementing
them, is enough, and calling one still fails with torchvision's own explanation. The other two raise
when imported; decoding sound and moving pictures could not have worked, so they are made to count
as not installed.

Everything here is inert beside a GPU build of torch and where the libraries load.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

MISSING_OPS: Final = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Name and schema of the operators torchvision registers a shape function for, unconditionally."""

LIBRARIES: Final = {
    "torchvision": "_C.*",
    "torchaudio": "lib/_torchaudio*.so",
    "torchcodec": "libtorchcodec_image*.so",
}
"""The library each package loads first when it is imported, below its folder."""

_defined: list[torch.library.Library] = []  # a Library undoes its definitions when it is collected


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


def declare_torchvision_ops() -> None:
    """Declare the operators of `MISSING_OPS` that do not exist yet."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _defined.append(library)
    for name, schema in MISSING_OPS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)  # type: ignore[no-untyped-call]


def hide(name: str) -> None:
    """Let a package count as not installed in this process.

    None in `sys.modules` is Python's own mark for "there is no such module": looking for it finds
    nothing, importing it raises the ImportError that optional imports expect. Transformers looks
    when it is imported, which may be before torch is, and remembers; it is made to look again.
    """
    sys.modules[name] = None  # type: ignore[assignment]
    if (transformers := sys.modules.get("transformers.utils.import_utils")) is not None:
        vars(transformers)[f"is_{name}_available"].cache_clear()


def fails_to_import(name: str) -> bool:
    """Whether importing a package fails in a Python of its own, without our help."""
    environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", f"import {name}"]
    result = subprocess.run(  # noqa: S603 - our own interpreter, a name from the table above
        command, env=environment, capture_output=True, check=False, timeout=120
    )
    return result.returncode != 0
