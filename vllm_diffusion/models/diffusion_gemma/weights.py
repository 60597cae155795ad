"""From the released checkpoint's weight names to this model's.

Encoder and decoder share every matrix; the file holds them once (under ``model.decoder``, or under
both names in older files). Two things are not shared: the self-conditioning block, which only the
decoder has, and ``layer_scalar``, one value a layer that a fine-tune may set apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Final

import torch
from vllm.model_executor.models.utils import WeightsMapper

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.models.decoder.weights import NO_FILE, lacking, some

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from torch import Tensor

MAPPER: Final = WeightsMapper(
    orig_to_new_regex={
        re.compile(
            r"^model\.encoder\.language_model\.(layers\.\d+\.)layer_scalar$"
        ): r"model.\1encoder_layer_scalar",
        re.compile(
            r"^model\.decoder\.(layers\.\d+\.)layer_scalar$"
        ): r"model.\1decoder_layer_scalar",
    },
    orig_to_new_stacked={
        ".self_conditioning.gate_proj.": (".self_conditioning.gate_up_proj.", 0),
        ".self_conditioning.up_proj.": (".self_conditioning.gate_up_proj.", 1),
    },
    orig_to_new_prefix={
        "model.decoder.self_conditioning.": "self_conditioning.",
        "model.decoder.": "model.",
        "model.encoder.language_model.": "model.",
        "model.encoder.vision_tower.": "vision_tower.",
        "model.encoder.embed_vision.": "embed_vision.",
    },
)
"""Applied by the loader and, for targets and ignore lists, by the quantisation config."""

VESTIGIAL_PREFIXES: Final = ["embed_vision.embedding."]
"""An embedding table of Gemma3n that some files still carry and no layer reads."""


# What a quantised matrix is in a file: one of the first two, and scales.
_PARTS = {
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "input_global_scale",
    "weight_scale_2",
    "input_scale",
}
_CODES = {"weight", "weight_packed"}
_GROUP = 16
_TREE = re.compile(r"^model\.(decoder\.|encoder\.language_model\.)?")
_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(?P<number>\d+)\.(?P<projection>\w+)$")
_SINGLE = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_PLAIN = re.compile(r"(^|\.)(router\.proj|lm_head)$")
_PLAIN_PARTS = {"weight", "bias"}


def unquantised(
    weights: Iterable[tuple[str, Tensor]], source: str, *, known: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The same weights; raises `CheckpointError` where a router or the head is quantised.

    Routers and, with the quantisations of the released files, the head are plain layers, which have
    no place for scales: vLLM ends at the first of them, and names a module of its own.

    Args:
        weights: by the names in the file.
        source: for the message.
        known: names that the model has a place for, as a head has that its scheme quantises.
    """
    quantised: dict[str, None] = {}
    for name, weight in weights:
        module, _, part = name.rpartition(".")
        if part not in _PLAIN_PARTS and _PLAIN.search(module) and name not in known:
            quantised[module] = None
        else:
            yield name, weight
    if quantised:
        raise CheckpointError(
            f"{source} is quantised where it cannot be served so: {some(list(quantised))}. A "
            "router and the head are served as plain matrices alone; quantise the model again with "
            'both in the ignore list, as in ignore=["re:.*router.*", "lm_head"] of llm-compressor.'
        )


def whole(
    weights: Iterable[tuple[str, Tensor]],
    source: str,
    *,
    modules: Iterable[str],
    experts: int | None,
) -> Iterator[tuple[str, Tensor]]:
    """The same weights; raises `CheckpointError` where parts are missing or do not belong together.

    vLLM holds q, k and v, gate and up, and a layer's experts as one parameter each, and counts it
    as loaded when a part of it was. The rest, weights or scales, would keep whatever the memory
    held. A scale of another shape ends in an assertion of vLLM's.

    Args:
        weights: by the names in the file.
        source: for the message.
        modules: the matrices there have to be, named as in `adapter_form`.
        experts: how many every layer has; None where the file may be read in part, by rank.
    """
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, weight in weights:
        module, _, part = name.rpartition(".")
        if part in _PARTS:
            # Shape and dtype are enough: a matrix may be gigabytes.
            found[module][part] = weight.to("meta")
            if misfit := _misfit(module, found[module]):
                raise CheckpointError(
                    f"{source} is not quantised as its config.json says: {misfit}. NVFP4 has one "
                    f"scale for {_GROUP} inputs, FP8 one for a row; quantise the model again."
                )
        elif module.endswith(".experts"):
            found[name] = {}  # the tensor of all experts of a layer
        yield name, weight
    if experts is None:
        # Of the experts of other ranks vLLM leaves out the codes, and reads the scales.
        others = [
            one for one, parts in found.items() if _EXPERT.match(one) and not parts.keys() & _CODES
        ]
        for module in others:
            del found[module]
    if missing := _missing_modules(modules, {_TREE.sub("", name) for name in found}, experts):
        raise lacking(f"{source} lacks the weights of", missing, NO_FILE)
    parts = [problem for module, parts in found.items() for problem in _lacks(module, parts)]
    if parts:
        why = "a file is missing or the model was not quantised whole"
        raise lacking(f"{source} lacks", parts, why)


def _misfit(module: str, parts: dict[str, Tensor]) -> str | None:
    """What is wrong with the shapes of a module's parts that were read so far."""
    codes = parts.get("weight_packed", parts.get("weight"))
    scale = parts.get("weight_scale")
    if codes is None or scale is None:
        return None
    rows, width = codes.shape
    expected = [rows, 2 * width // _GROUP] if codes.dtype == torch.uint8 else [rows, 1]
    if list(scale.shape) == expected:
        return None
    return f"{module}.weight_scale is {list(scale.shape)}, expected {expected}"


def _lacks(module: str, parts: dict[str, Tensor]) -> list[str]:
    """Names of what belongs to a module's parts and is in no file."""
    needed: set[str] = set()
    if "weight_packed" in parts:
        needed = {"weight_scale", "weight_global_scale"}
    elif "weight" in parts and parts["weight"].dtype == torch.uint8:
        needed = {"weight_scale", "weight_scale_2"}
    elif "weight" in parts:
        needed = {"weight_scale"} if parts["weight"].itemsize == 1 else set()
    elif parts:
        return [f"the weights of {module}"]
    return [f"{module}.{part}" for part in sorted(needed - parts.keys())]


def _missing_modules(
    modules: Iterable[str], found: Collection[str], experts: int | None
) -> list[str]:
    """Which of the modules are in no file, by their names there, of experts by the number."""
    seen = {int(match["number"]) for name in found if (match := _EXPERT.match(name))}
    numbers = sorted(seen) if experts is None else range(experts)
    missing: list[str] = []
    for module in modules:
        if module in found:
            continue
        layer, _, projection = module.rpartition(".")
        single = (
            [f"{layer}.{number}.{one}" for number in numbers for one in _SINGLE[projection]]
            if layer.endswith(".experts")
            else []
        )
        lacking = [name for name in single if name not in found]
        # Where there is none at all, the file may rather have had them in one tensor.
        missing += lacking if len(lacking) < len(single) else [module]
    return [f"model.decoder.{name}" for name in missing]
