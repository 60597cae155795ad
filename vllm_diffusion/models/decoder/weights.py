"""The weights of a checkpoint's files: readable, and all there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError

from vllm_diffusion.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor, nn

PACKED_MODULES: Final = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Which projections of the file are one matrix here; quantisation configs look this up."""

NO_FILE: Final = "a file is missing or belongs to another model"

_NAMED = 5
_CACHE_SCALES = ".self_attn.attn."
_INPUT_SCALE = "input_scale"
_EXPERTS = ".experts."
_EXPERT_PARTS = ("gate_proj", "up_proj", "down_proj")


def readable(weights: Iterable[tuple[str, Tensor]], source: str) -> Iterator[tuple[str, Tensor]]:
    """The same weights; raises `CheckpointError` where a file of `source` cannot be read."""
    try:
        yield from weights
    except SafetensorError as error:
        raise CheckpointError(
            f"a weight file of {source} cannot be read ({error}): it is damaged or incomplete; "
            "fetch the checkpoint again."
        ) from error


def refuse_missing(model: nn.Module, loaded: set[str], source: str) -> None:
    """Raise `CheckpointError` if a parameter kept its random start.

    vLLM's own check excuses every layer that processes its weights after loading: on CPU that is
    all of them, and a shard that was never downloaded would be served as noise.
    """
    # Scales of a quantised cache have a default, and few files hold any. Those of activations, as
    # Model Optimizer calls them, are not in every file and are not used where files are checked.
    parameters = {
        name
        for name, _ in model.named_parameters()
        if _CACHE_SCALES not in name and not name.endswith(_INPUT_SCALE)
    }
    if missing := sorted(parameters - loaded):
        raise lacking(f"{source} lacks the weights of", missing, NO_FILE)


def complete(
    weights: Iterable[tuple[str, Tensor]], model: nn.Module, source: str, *, experts: int
) -> Iterator[tuple[str, Tensor]]:
    """The same weights; raises `CheckpointError` at their end if one is in no file.

    vLLM holds q, k and v, gate and up, and a layer's experts as one parameter each, and counts it
    as loaded when a part of it was. For plain matrices of vLLM's own decoders.

    Args:
        weights: by the names that the backbone knows, before any are stacked.
        model: what they are for.
        source: for the message.
        experts: how many a layer has; 0 where the file may be read in part, by rank.
    """
    found = set()
    for name, weight in weights:
        found.add(name)
        yield name, weight
    expected = [one for name, _ in model.named_parameters() for one in _in_a_file(name, experts)]
    if missing := [name for name in expected if name not in found]:
        raise lacking(f"{source} lacks", missing, NO_FILE)


def _in_a_file(parameter: str, experts: int) -> list[str]:
    """What a parameter of the model is in a file: itself, or the parts that are stacked in it."""
    if _EXPERTS in parameter:
        block = parameter.partition(_EXPERTS)[0] + _EXPERTS
        return [f"{block}{n}.{part}.weight" for n in range(experts) for part in _EXPERT_PARTS]
    module, _, kind = parameter.rpartition(".")
    parent, _, layer = module.rpartition(".")
    return (
        [f"{parent}.{part}.{kind}" for part in PACKED_MODULES[layer]]
        if layer in PACKED_MODULES
        else [parameter]
    )


def lacking(lacks: str, missing: Sequence[str], why: str) -> CheckpointError:
    """The error that names what is in no file."""
    return CheckpointError(f"{lacks} {some(missing)}: {why}; fetch the checkpoint again.")


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
