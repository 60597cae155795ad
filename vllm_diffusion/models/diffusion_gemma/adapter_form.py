"""What LoRA adapters of DiffusionGemma change, and for which rows: names in PEFT's files.

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

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.engine.lora.form import AdaptedMatrix, Located, Remark

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from vllm_diffusion.engine.lora.form import Coverage

TEXT: Final = "text"
"""Rows of prompts and commits: Transformers' encoder."""
CANVAS: Final = "canvas"
"""Rows of canvases: its decoder."""
BOTH: Final = (TEXT, CANVAS)

SHARED: Final = "shared_stack"
"""Entry of ``adapter_config.json``: whether the decoder's names are of the one stack of layers."""

_ONE_STACK: Final = "automodel_peft_config.json"
_ENCODER_TREE: Final = "model.encoder.language_model."
_DECODER_TREE: Final = "model.decoder."
_TREES: Final = (
    (f"{_ENCODER_TREE}layers.", (TEXT,), _ENCODER_TREE, "layers."),
    (f"{_DECODER_TREE}layers.", (CANVAS,), _DECODER_TREE, "layers."),
    ("model.layers.", BOTH, "model.", "layers."),
    (f"{_DECODER_TREE}self_conditioning.", (CANVAS,), _DECODER_TREE, "self_conditioning."),
    ("model.self_conditioning.", (CANVAS,), _DECODER_TREE, "self_conditioning."),
)
"""How names begin, for which rows, the tree that they are of, and how they begin below it."""
_IMAGE_TREES: Final = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")

_FUSED: Final = {
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
}
"""Of matrices that are one layer here: the layer, which part of it they are, and of how many."""

_VALUES: Final = 2
"""The part of ``qkv_proj`` that holds values."""


class DiffusionGemmaAdapters:
    """Adapters of DiffusionGemma, an ``engine.lora.form.AdapterForm``."""

    row_kinds = BOTH

    def matrices(self, text_config: Any) -> dict[str, AdaptedMatrix]:
        """Every matrix that an adapter may change, by the module's name below either tree.

        Args:
            text_config: Transformers' ``DiffusionGemmaTextConfig``.
        """
        found: dict[str, AdaptedMatrix] = {}
        hidden, inner = text_config.hidden_size, text_config.intermediate_size
        mlp = {
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }
        for name, shape in mlp.items():
            module = f"self_conditioning.{name}"
            found[module] = _linear(module, shape, conditions=True)
        for index, kind in enumerate(text_config.layer_types):
            layer = text_config.per_layer_config[index]
            queries = text_config.num_attention_heads * layer.head_dim
            keys = layer.num_key_value_heads * layer.head_dim
            linears = {
                "self_attn.q_proj": (hidden, queries),
                "self_attn.k_proj": (hidden, keys),
                "self_attn.v_proj": (hidden, keys),
                "self_attn.o_proj": (queries, hidden),
                **{f"mlp.{name}": shape for name, shape in mlp.items()},
                "router.proj": (hidden, text_config.num_experts),
            }
            also: dict[str, tuple[int, ...]] = {}
            if kind == "full_attention":  # its values are the keys
                del linears["self_attn.v_proj"]
                also["self_attn.k_proj"] = (_VALUES,)
            for name, shape in linears.items():
                module = f"layers.{index}.{name}"
                found[module] = _linear(module, shape, also=also.get(name, ()))
            found |= _experts(f"layers.{index}.experts", text_config)
        return found

    def problems(self, config: Mapping[str, Any]) -> list[str]:
        """A ``shared_stack`` that is no truth value."""
        if isinstance(config.get(SHARED, False), bool):
            return []
        return [f"{SHARED} must be true or false, got {config[SHARED]!r}"]

    def names(self, folder: Path, config: Mapping[str, Any]) -> Callable[[str], Located | None]:
        """What a module's name means in this adapter."""
        told = config.get(SHARED)
        shared = told if isinstance(told, bool) else (folder / _ONE_STACK).is_file()
        return partial(_located, shared=shared)

    def is_outside(self, module: str) -> bool:
        """Whether a module is of the vision tower or of its connector."""
        return module.startswith(_IMAGE_TREES)

    def remark(self, name: str, coverage: Coverage) -> Remark | None:
        """Which rows an adapter leaves as they are, or that one set of factors serves all."""
        if TEXT not in coverage.kinds:
            return Remark(
                logging.WARNING,
                f"The adapter {name!r} has factors of the decoder alone: rows of prompts and "
                "commits run unadapted. Where it was trained on one stack of layers, add "
                f'"{SHARED}": true to its adapter_config.json.',
            )
        if CANVAS not in coverage.kinds:
            return Remark(
                logging.WARNING,
                f"The adapter {name!r} has factors of the encoder alone: rows of canvases run "
                "unadapted.",
            )
        if coverage.shared:
            return Remark(
                logging.INFO,
                f"The adapter {name!r}, made for {coverage.made_for}, is of one stack of layers: "
                "its factors serve rows of prompts, commits and canvases.",
            )
        return None


FORM: Final = DiffusionGemmaAdapters()
"""What ``Family.adapters`` names."""


def _linear(
    module: str, shape: tuple[int, int], *, also: tuple[int, ...] = (), conditions: bool = False
) -> AdaptedMatrix:
    """A plain matrix; self-conditioning stands beside the layers of vLLM's model."""
    parent, _, last = module.rpartition(".")
    layer, part, parts = _FUSED.get(last, (last, 0, 1))
    return AdaptedMatrix(
        inputs=shape[0],
        outputs=shape[1],
        path=f"{'' if conditions else 'model.'}{parent}.{layer}",
        part=part,
        parts=parts,
        also=also,
        conditions=conditions,
    )


def _experts(module: str, text_config: Any) -> dict[str, AdaptedMatrix]:
    """The two stacks of a layer's experts, in the order of the served layer's parts."""
    hidden, inner = text_config.hidden_size, text_config.moe_intermediate_size
    shapes = {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
    return {
        f"{module}.{name}": AdaptedMatrix(
            inputs=inputs,
            outputs=outputs,
            path=f"model.{module}",
            part=part,
            parts=len(shapes),
            experts=text_config.num_experts,
        )
        for part, (name, (inputs, outputs)) in enumerate(shapes.items())
    }


def _located(module: str, *, shared: bool) -> Located | None:
    for beginning, kinds, tree, below in _TREES:
        if module.startswith(beginning):
            alike = shared and beginning == f"{_DECODER_TREE}layers."
            name = below + module.removeprefix(beginning)
            return Located(kinds=BOTH if alike else kinds, tree=tree, module=name)
    return None
