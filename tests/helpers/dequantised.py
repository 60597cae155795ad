"""The plain weights that a quantised checkpoint stands for, by arithmetic of its own in fp64."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from safetensors.torch import load_file, save_file

from vllm_diffusion.testing.quantise import WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def write_dequantised(quantised: Path, plain: Path, target: Path) -> Path:
    """A plain checkpoint in `target` with the numbers of `quantised`, made of `plain`, in fp32."""
    shutil.copytree(plain, target)
    stored, weights = load_file(quantised / WEIGHTS), load_file(plain / WEIGHTS)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        layer, _, projection = module.rpartition(".")
        if layer.endswith(".experts"):
            names = ["gate_proj", "up_proj"] if projection == "gate_up_proj" else [projection]
            numbers = torch.stack(
                [
                    torch.cat([matrix(stored, f"{layer}.{expert}.{one}") for one in names])
                    for expert in range(len(weight))
                ]
            )
        elif f"{module}.weight_scale" in stored:
            numbers = matrix(stored, module)
        else:
            numbers = weight
        assert numbers.shape == weight.shape, name
        weights[name] = numbers.float()
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    return target


def matrix(stored: dict[str, Tensor], module: str) -> Tensor:
    """One module's matrix, fp64."""
    scale = stored[f"{module}.weight_scale"].double()
    if (codes := stored.get(f"{module}.weight_packed")) is None:
        return stored[f"{module}.weight"].double() * scale
    values = unpack_fp4_from_uint8(codes, len(codes), 2 * codes.shape[1], dtype=torch.float64)
    scale = scale / stored[f"{module}.weight_global_scale"].double()
    return values * scale.repeat_interleave(16, dim=1)
