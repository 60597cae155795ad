"""Which matrices of a DiffusionGemma checkpoint the released quantised ones hold in fewer bits.

Experts are named one by one, full-attention layers have no v_proj, and head, embeddings, routers,
self-conditioning and vision stay as they are.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

FUSED: Final = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Projections that an engine multiplies as one matrix: they share the scale of the whole tensor."""

_LAYERS = "model.decoder.layers."
_QUANTISED = ("self_attn.", "mlp.", "experts.")


def split(weights: Mapping[str, "Tensor"]) -> tuple[dict[str, "Tensor"], dict[str, "Tensor"]]:
    """The matrices to quantise, by module, and the tensors to leave alone, by name."""
    matrices: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    for name, weight in weights.items():
        _, _, inside = name.removeprefix(_LAYERS).partition(".")
        if not name.startswith(_LAYERS) or not inside.startswith(_QUANTISED) or weight.ndim < 2:  # noqa: PLR2004 -- norms are vectors
            rest[name] = weight
        elif inside.startswith("experts."):
            matrices.update(_single_experts(name, weight))
        else:
            matrices[name.removesuffix(".weight")] = weight
    return matrices, rest


def _single_experts(name: str, weight: "Tensor") -> Iterator[tuple[str, "Tensor"]]:
    """The matrices of a fused tensor [E, ...] by the name of the module each would be."""
    experts, _, projection = name.rpartition(".")
    for number, expert in enumerate(weight):
        if projection == "gate_up_proj":
            gate, up = expert.chunk(2)
            yield f"{experts}.{number}.gate_proj", gate
            yield f"{experts}.{number}.up_proj", up
        else:
            yield f"{experts}.{number}.{projection}", expert


def plain_linears(rest: Mapping[str, "Tensor"]) -> list[str]:
    """The linear modules that stay as they are, as llm-compressor lists them: by name."""
    modules = {
        name.removesuffix(".weight")
        for name, weight in rest.items()
        if name.endswith(".weight") and weight.ndim > 1 and not name.endswith("embed_tokens.weight")
    }
    return [*sorted(modules), "lm_head"]
