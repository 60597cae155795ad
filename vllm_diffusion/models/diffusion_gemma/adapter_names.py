"""What the names in an adapter's file mean: which module of ours, and for which kinds of row.

Transformers holds encoder and decoder as two trees of modules that share their weights. PEFT wraps
modules, so an adapter has factors of its own for each tree, and training sets them apart: an
encoder is reached through the cache alone. Here one backbone serves both kinds of row, so the two
are kept apart by row. An adapter may also name one tree only; the other then stays the base model.

NVIDIA's NeMo AutoModel trains one stack of layers, which runs as encoder and as decoder: its
factors are for rows of either kind. It saves them as ``model.layers.``, or, where the base model
is quantised, under the decoder's names without PEFT's prefix. Decoder names are also what PEFT
saves of a decoder alone, so something beside the names has to say which of the two they are:
``shared_stack`` in ``adapter_config.json``, else the file of its own options that NeMo adds.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

TEXT: Final = "text"
CANVAS: Final = "canvas"
BOTH: Final = (TEXT, CANVAS)

SHARED: Final = "shared_stack"
"""Entry of ``adapter_config.json``: whether the decoder's names are of the one stack of layers."""

EXPERT_MATRICES: Final = ("gate_up_proj", "down_proj")
"""The two tensors of a layer's experts, in the order of the served layer's parts."""

_ONE_STACK: Final = "automodel_peft_config.json"
_DECODER: Final = "model.decoder.layers."
_TREES: Final = (
    ("model.encoder.language_model.layers.", (TEXT,), "layers."),
    (_DECODER, (CANVAS,), "layers."),
    ("model.layers.", BOTH, "layers."),
    ("model.decoder.self_conditioning.", (CANVAS,), "self_conditioning."),
    ("model.self_conditioning.", (CANVAS,), "self_conditioning."),
)
_IMAGE_TREES: Final = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
_FACTOR: Final = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight$")

_PACKED: Final = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def factors_by_module(
    names: Iterable[str],
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Names of a file: by module and factor (A or B), and those that are of no factor."""
    modules: dict[str, dict[str, str]] = {}
    strange = []
    for name in sorted(names):
        match = _FACTOR.match(name)
        if match is None or match[2] in modules.get(match[1], {}):
            strange.append(name)
        else:
            modules.setdefault(match[1], {})[match[2]] = name
    return modules, strange


def shares_stack(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the decoder's names in this adapter serve text rows as well.

    Args:
        folder: of the adapter.
        config: its ``adapter_config.json``.
    """
    told = config.get(SHARED)
    return told if isinstance(told, bool) else (folder / _ONE_STACK).is_file()


def located(full: str, *, shared: bool) -> tuple[tuple[str, ...], str]:
    """Kinds of row and name below its tree of a module; no kind where there is no such tree."""
    for prefix, sides, below in _TREES:
        if full.startswith(prefix):
            own = BOTH if shared and prefix == _DECODER else sides
            return own, below + full.removeprefix(prefix)
    return (), full


def is_of_images(full: str) -> bool:
    """Whether a module is of the vision tower or of its connector."""
    return full.startswith(_IMAGE_TREES)


def placed_at(module: str) -> tuple[str, int]:
    """The path in our model of a module named as in ``adapter.adaptable``, and its part there."""
    parent, _, last = module.rpartition(".")
    root = "" if module.startswith("self_conditioning.") else "model."
    if parent.endswith(".experts"):
        return root + parent, EXPERT_MATRICES.index(last)
    packed, index = _PACKED.get(last, (last, 0))
    return f"{root}{parent}.{packed}", index
