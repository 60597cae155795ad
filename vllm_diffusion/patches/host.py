"""Before vLLM is imported, companions of torch that cannot load are made harmless.

The plugin's `register()` runs when vLLM loads general plugins, which is after vLLM has imported its
configuration and with it Transformers, torchvision and torchaudio. Where importing those raises
(``upstream.torch_companions`` says where), that is too late. torch calls the entry points of the
group `torch.backends` at the end of its own import: the only moment that comes before all of them,
in every process, also in one that uses Transformers alone.

torchvision can do without its library (its Python transforms need none of it) except for two shape
functions that it registers for operators it assumes to exist: `operator torchvision::nms does not
exist`. Declaring the operators, without implementing them, is enough, and calling one still fails
with torchvision's own explanation. The other two raise when imported; decoding sound and moving
pictures could not have worked, so they are made to count as not installed.

No function here may import more than torch.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

from vllm_diffusion.upstream.torch_companions import fails_to_import

if TYPE_CHECKING:
    import torch

MISSING_OPS: Final = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""Name and schema of the operators torchvision registers a shape function for, unconditionally."""

_defined: list[torch.library.Library] = []  # a Library undoes its definitions when it is collected


def prepare_host() -> None:
    """Entry point of the group `torch.backends`.

    Not switched off by `VLLM_DIFFUSION=0`: without it stock vLLM cannot be imported on such a host
    either. An error here would make torch itself unimportable, hence the one broad suppression of
    this package: what is wrong with a companion then shows when it is imported.
    """
    with contextlib.suppress(Exception):
        from vllm_diffusion.patches.table import PATCHES
        from vllm_diffusion.upstream import ledger

        ledger.register(PATCHES)
        ledger.apply_stage(ledger.Stage.TORCH)


def declare_torchvision_ops() -> None:
    """Declare the operators of `MISSING_OPS` that do not exist yet."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    _defined.append(library)
    for name, schema in MISSING_OPS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)  # type: ignore[no-untyped-call]


def hide_torchaudio() -> None:
    """Let torchaudio count as not installed in this process."""
    _hide("torchaudio")


def hide_torchcodec() -> None:
    """Let torchcodec count as not installed in this process."""
    _hide("torchcodec")


def _hide(name: str) -> None:
    """Let a package count as not installed.

    None in `sys.modules` is Python's own mark for "there is no such module": looking for it finds
    nothing, importing it raises the ImportError that optional imports expect. Transformers looks
    when it is imported, which may be before torch is, and remembers; it is made to look again.
    """
    sys.modules[name] = None  # type: ignore[assignment]
    if (transformers := sys.modules.get("transformers.utils.import_utils")) is not None:
        vars(transformers)[f"is_{name}_available"].cache_clear()


def torchvision_fails_to_import() -> bool:
    """Whether torchvision still cannot be imported without our help."""
    return fails_to_import("torchvision")


def torchaudio_fails_to_import() -> bool:
    """Whether torchaudio still cannot be imported without our help."""
    return fails_to_import("torchaudio")


def torchcodec_fails_to_import() -> bool:
    """Whether torchcodec still cannot be imported without our help."""
    return fails_to_import("torchcodec")
