"""Weights and config of a decoder of Transformers, saved by the names of another checkpoint."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_diffusion.testing.json_file import write_json

if TYPE_CHECKING:
    from torch import Tensor


def save_decoder(
    directory: Path,
    model: Any,  # noqa: ANN401 -- a decoder of Transformers with a head
    config: dict[str, Any],
    *,
    renamed: Callable[[str], str] = str,
) -> None:
    """Write `model.safetensors` and `config.json`.

    Args:
        directory: where to.
        model: its weights are saved in the config's `torch_dtype`; a tied head is left out.
        config: the content of `config.json`.
        renamed: the name in the file of a weight of the model; experts have one each.
    """
    import torch
    from safetensors.torch import save_file

    dtype: torch.dtype = getattr(torch, config["torch_dtype"])
    weights = {
        renamed(one): part.to(dtype).contiguous()
        for name, weight in model.named_parameters()
        for one, part in _each_expert(name, weight.detach())
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config)


def _each_expert(name: str, weight: "Tensor") -> Iterator[tuple[str, "Tensor"]]:
    """A weight by its name; of all experts at once, those of each, gate and up apart."""
    block, found, projection = name.partition(".experts.")
    if not found:
        yield name, weight
        return
    for index, matrix in enumerate(weight):
        expert = f"{block}.experts.{index}"
        if projection == "gate_up_proj":
            gate, up = matrix.chunk(2)
            # Cloned: the file format refuses tensors that share memory.
            yield f"{expert}.gate_proj.weight", gate.clone()
            yield f"{expert}.up_proj.weight", up.clone()
        else:
            yield f"{expert}.{projection}.weight", matrix.clone()
