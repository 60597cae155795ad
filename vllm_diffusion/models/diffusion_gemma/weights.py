"""From the released checkpoint's weight names to this model's.

Encoder and decoder share every matrix; the file holds them once (under ``model.decoder``, or under
both names in older files). Two things are not shared: the self-conditioning block, which only the
decoder has, and ``layer_scalar``, one value a layer that a fine-tune may set apart.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError
from vllm.model_executor.models.utils import WeightsMapper

from vllm_diffusion.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor, nn

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

PACKED_MODULES: Final = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}
"""Which projections of the file are one matrix here; quantisation configs look this up."""

VESTIGIAL_PREFIXES: Final = ["embed_vision.embedding."]
"""An embedding table of Gemma3n that some files still carry and no layer reads."""


_NAMED = 5


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
    missing = sorted({name for name, _ in model.named_parameters()} - loaded)
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise CheckpointError(
            f"{source} lacks the weights of {', '.join(missing[:_NAMED])}{more}: a file is missing "
            "or belongs to another model; fetch the checkpoint again."
        )
