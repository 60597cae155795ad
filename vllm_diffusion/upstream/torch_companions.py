"""torchvision, torchaudio and torchcodec built for CUDA, beside a torch built for CPU.

That is what plain pip installs on a CPU host: vLLM's CPU wheel asks for all three, and PyPI has CUDA
builds only. Their libraries cannot load there. torchvision tolerates that (its Python transforms need
none of it) except for two registrations that assume the operators exist; declaring those, without an
implementation, is enough. The other two raise when imported; audio and video decoding could not have
worked, so they are made to count as not installed.

Everything here is inert beside a GPU build of torch and where the libraries load.
"""

from __future__ import annotations

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
    loads is thereby loaded, and stays. A GPU build of torch is left alone: a companion that does not
    fit it is an installation to repair.
    """
    import torch

    folder = _package_folder(name)
    if folder is None or torch.version.cuda is not None or torch.version.hip is not None:
        return False
    libraries = sorted(folder.glob(LIBRARIES[name]))
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return True
    return False


def declare_torchvision_ops() -> None:
    """Declare the operators of `MISSING_OPS` that do not exist yet."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    _defined.append(library)
    for name, schema in MISSING_OPS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)


def hide(name: str) -> None:
    """Let a package count as not installed in this process.

    None in ``sys.modules`` is Python's own mark for "there is no such module": looking for it finds
    nothing, importing it raises the ImportError that optional imports expect.
    """
    sys.modules[name] = None  # type: ignore[assignment]


def source_says(name: str, file: str, text: str) -> bool:
    """Whether a file of an installed package still contains a text; False when it is not there."""
    folder = _package_folder(name)
    return folder is not None and text in (folder / file).read_text(encoding="utf-8")


def _package_folder(name: str) -> Path | None:
    spec = None if name in sys.modules and sys.modules[name] is None else find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])
