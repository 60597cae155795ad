"""How the released quantised checkpoints store the matrix of a layer.

NVFP4 of compressed-tensors     weight_packed, weight_scale, and weight_global_scale to divide by
NVFP4 of Model Optimizer        weight, weight_scale, and weight_scale_2 to multiply with
FP8 by channel                  weight, weight_scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType

from vllm_diffusion.quant.packed import GROUP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compressed_tensors.quantization import QuantizationArgs
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightForm:
    """How the matrices of a layer are stored; the released schemes differ in nothing else."""

    name: Literal["NVFP4", "FP8"]
    input_scale: bool
    """Whether the file holds a scale of the activations too. It is loaded and dropped."""
    optimizer: bool = False
    """Whether Model Optimizer wrote it, and not compressed-tensors."""

    @property
    def codes(self) -> tuple[str, torch.dtype, int]:
        """Name in the file, dtype, and how many weights one element holds."""
        if not self.grouped:
            return "weight", torch.float8_e4m3fn, 1
        return "weight" if self.optimizer else "weight_packed", torch.uint8, 2

    @property
    def grouped(self) -> bool:
        """Whether groups of inputs have scales, and the whole tensor another."""
        return self.name == "NVFP4"

    @property
    def whole_scales(self) -> list[str]:
        """Names of the scales of a whole tensor, that of the weights first."""
        if not self.grouped:
            return []
        names = ["weight_scale_2", "input_scale"]
        if not self.optimizer:
            names = ["weight_global_scale", "input_global_scale"]
        return names[: 1 + self.input_scale]

    def factor(self, scale: Tensor) -> Tensor:
        """What weights are multiplied with for the scale of a whole tensor."""
        return scale if self.optimizer else 1 / scale


OPTIMIZER_NVFP4: Final = WeightForm(name="NVFP4", input_scale=True, optimizer=True)
"""The one form of Model Optimizer that is read here."""


def form_of(scheme: Mapping[str, Any] | None) -> WeightForm | None:
    """The form of a compressed-tensors scheme; None where it is neither released one."""
    weights: QuantizationArgs | None = scheme and scheme["weights"]
    if not scheme or weights is None or weights.type != QuantizationType.FLOAT:
        return None
    inputs: QuantizationArgs | None = scheme["input_activations"]
    if not weights.symmetric or weights.dynamic:
        return None
    kind = weights.num_bits, weights.strategy, weights.group_size
    if kind == (4, QuantizationStrategy.TENSOR_GROUP, GROUP):
        return WeightForm(name="NVFP4", input_scale=inputs is not None)
    # Activations with a scale in the file are another scheme, FP8 static.
    if kind == (8, QuantizationStrategy.CHANNEL, None) and (inputs is None or inputs.dynamic):
        return WeightForm(name="FP8", input_scale=False)
    return None


def described(schemes: list[dict[str, Any] | None]) -> str:
    """What is asked for, in short."""
    asked = {
        f"{args.num_bits} bit {args.type} weights by {args.strategy}"
        + (f" of {args.group_size}" if args.group_size else "")
        for scheme in schemes
        if scheme and (args := scheme["weights"])
    }
    return ", ".join(sorted(asked)) or "no scheme"
