"""compressed-tensors on a CPU host, where stock vLLM runs neither released checkpoint.

vLLM 0.32 has no NVFP4 kernel for CPUs and no experts in FP8 by channel. Here the two released
schemes, NVFP4 and FP8 by channel, are weights only: matrices stay packed (`quant.product`), or,
where the C++ part is not built, are dequantised when they are loaded and run as plain ones.
Whatever else a checkpoint asks for goes to vLLM. Nothing of vLLM is replaced: the model class hands
its layers this configuration in place of the one vLLM read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from compressed_tensors.quantization import QuantizationStrategy, QuantizationType
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import (
    FusedMoeWeightScaleSupported,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.quant import native, product
from vllm_diffusion.quant.packed import GROUP, PackedMatrix, dequantise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compressed_tensors.quantization import QuantizationArgs
    from vllm.model_executor.layers.quantization import QuantizationConfig
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

_BYTE: Final = torch.uint8
_REFUSALS: Final = (AssertionError, NotImplementedError, RuntimeError, ValueError)
"""What vLLM raises where it has no scheme or no kernel for a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightForm:
    """How the matrices of a layer are stored; the two released schemes differ in nothing else."""

    name: Literal["NVFP4", "FP8"]
    input_scale: bool
    """Whether the file holds a scale of the activations too. It is loaded and dropped."""

    @property
    def codes(self) -> tuple[str, torch.dtype, int]:
        """Name in the file, dtype, and how many weights one element holds."""
        return ("weight_packed", _BYTE, 2) if self.grouped else ("weight", torch.float8_e4m3fn, 1)

    @property
    def grouped(self) -> bool:
        """Whether groups of inputs have scales, and the whole tensor another."""
        return self.name == "NVFP4"


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


def is_released(config: QuantizationConfig | None) -> bool:
    """Whether a checkpoint is quantised in the released forms and in no other."""
    if not isinstance(config, CompressedTensorsConfig):
        return False
    schemes = config.target_scheme_map.values()
    return bool(schemes) and all(form_of(scheme) is not None for scheme in schemes)


class HostQuantisation(CompressedTensorsConfig):
    """What a checkpoint says about its quantisation, for the layers of a model on a CPU."""

    @classmethod
    def adopt(cls, config: QuantizationConfig | None) -> None:
        """Turn what vLLM read into this, in place, on a CPU host and for compressed-tensors."""
        if current_platform.is_cpu() and type(config) is CompressedTensorsConfig:
            config.__class__ = cls

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How a layer stores and uses its weights.

        Raises:
            CheckpointError: the layer's scheme is one that nothing here can run.
        """
        schemes = self._schemes(layer, prefix)
        forms = {form_of(scheme) for scheme in schemes}
        form = forms.pop() if len(forms) == 1 else None
        if form is not None:
            if isinstance(layer, RoutedExperts):
                return HostExperts(layer, form)
            return HostLinear(form)
        try:
            return super().get_quant_method(layer, prefix)
        except _REFUSALS as error:
            raise CheckpointError(
                f"{prefix} is quantised in a way that a CPU cannot run ({_described(schemes)}): "
                f"{str(error) or type(error).__name__}. On a CPU these run: NVFP4 in groups of "
                f"{GROUP} (W4A4 or W4A16), FP8 by channel with dynamic activations, and what vLLM "
                "itself runs there."
            ) from error

    def _schemes(self, layer: nn.Module, prefix: str) -> list[dict[str, Any] | None]:
        """The schemes of a layer's matrices; none of a layer that this does not decide about."""
        if isinstance(layer, RoutedExperts):
            names = (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name)
            # In the file every expert is three linear layers, and that is what a scheme targets.
            linear = nn.Linear(1, 1, device="meta")
            return [self.get_scheme_dict(linear, f"{prefix}.0.{name}") for name in names]
        if isinstance(layer, LinearBase):
            return [self.get_scheme_dict(layer, prefix)]
        return []


@register_weight_loader_v2_supported_method
class HostLinear(UnquantizedLinearMethod):
    """A linear layer with a packed matrix, or with a plain one made of it when it is loaded."""

    def __init__(self, form: WeightForm) -> None:
        super().__init__()
        self.form = form
        self.packed: tuple[PackedMatrix, ...] = ()

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The parameters that the file fills, under its names."""
        del input_size, output_size
        _refuse_ragged(layer.prefix, input_size_per_partition, self.form)
        self.dtype = params_dtype
        self.parts = output_partition_sizes
        loader = extra_weight_attrs["weight_loader"]
        rows, inputs = sum(output_partition_sizes), input_size_per_partition
        sides = {"input_dim": 1, "output_dim": 0, "weight_loader": loader}
        name, dtype, weights = self.form.codes
        layer.register_parameter(
            name,
            ModelWeightParameter(data=torch.empty(rows, inputs // weights, dtype=dtype), **sides),
        )
        if not self.form.grouped:
            scale = ChannelQuantScaleParameter(
                data=torch.empty(rows, 1), output_dim=0, weight_loader=loader
            )
            layer.register_parameter("weight_scale", scale)
            return
        groups = torch.empty(rows, inputs // GROUP, dtype=torch.float8_e4m3fn)
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=groups, **sides))
        for tensor in ("weight", "input")[: 1 + self.form.input_scale]:
            overall = torch.empty(len(self.parts))
            layer.register_parameter(
                f"{tensor}_global_scale",
                PerTensorScaleParameter(data=overall, weight_loader=loader),
            )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Take the parameters off the layer, and keep the matrix they make.

        Raises:
            CheckpointError: a code or a scale is no number.
        """
        parameters = _take_parameters(layer)
        if self.form.grouped:
            parts = torch.tensor(self.parts)
            row_scale = (1 / parameters["weight_global_scale"]).repeat_interleave(parts)
        else:
            row_scale = parameters["weight_scale"][:, 0]
        packed = _packed(layer.prefix, self.form, parameters, "", row_scale)
        if stays_packed(self.dtype):
            self.packed = (packed,)
            # No parameter: vLLM's adapted layers ask a base layer's weights where they are.
            layer.weight_packed = packed.codes
        else:
            layer.weight = nn.Parameter(dequantise(packed, self.dtype), requires_grad=False)
            super().process_weights_after_loading(layer)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[.., K] -> [.., N]."""
        if not self.packed:
            return super().apply(layer, x, bias)
        rows = product.linear(x.reshape(-1, x.shape[-1]), *self.packed)
        return (rows if bias is None else rows + bias).view(*x.shape[:-1], -1)


class HostExperts(UnquantizedFusedMoEMethod):
    """Routed experts with packed matrices, or with plain ones made of them when loaded."""

    supports_eplb = False

    def __init__(self, layer: RoutedExperts, form: WeightForm) -> None:
        # No adapter changes quantised experts, so where they are dequantised they run as without.
        super().__init__(dataclasses.replace(layer.moe_config, is_lora_enabled=False))
        self.form = form
        self.name = layer.layer_name
        self.packed: tuple[PackedMatrix, ...] = ()
        assert layer.activation == MoEActivation.GELU_TANH, layer.activation
        assert not layer.apply_router_weight_on_input

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The parameters that the file fills, gate and up as one."""
        self.dtype = params_dtype
        name, dtype, weights = self.form.codes

        def register(
            name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: str = ""
        ) -> None:
            empty = torch.empty(num_experts, *shape, dtype=dtype)
            parameter = nn.Parameter(empty, requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(
                parameter, extra_weight_attrs | ({"quant_method": scale} if scale else {})
            )

        inner = intermediate_size_per_partition
        kinds = FusedMoeWeightScaleSupported
        for stem, rows, inputs, parts in (
            ("w13", 2 * inner, hidden_size, (2,)),
            ("w2", hidden_size, inner, ()),
        ):
            _refuse_ragged(self.name, inputs, self.form)
            register(f"{stem}_{name}", (rows, inputs // weights), dtype)
            scale = f"{stem}_weight_scale"
            if not self.form.grouped:
                register(scale, (rows, 1), torch.float32, kinds.CHANNEL.value)
                continue
            register(scale, (rows, inputs // GROUP), torch.float8_e4m3fn, kinds.GROUP.value)
            for tensor in ("weight", "input")[: 1 + self.form.input_scale]:
                overall = f"{stem}_{tensor}_global_scale"
                register(overall, parts, torch.float32, kinds.TENSOR.value)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Take the parameters off the layer, and keep the matrices they make.

        Raises:
            CheckpointError: a code or a scale is no number.
        """
        parameters = _take_parameters(layer)
        both = []
        for stem in ("w13_", "w2_"):
            experts, rows = parameters[f"{stem}weight_scale"].shape[:2]
            if self.form.grouped:
                overall = 1 / parameters[f"{stem}weight_global_scale"].view(experts, -1)
                row_scale = overall.repeat_interleave(rows // overall.shape[1], dim=1)
            else:
                row_scale = parameters[f"{stem}weight_scale"][..., 0]
            both.append(_packed(self.name, self.form, parameters, stem, row_scale))
        if stays_packed(self.dtype):
            self.packed = tuple(both)
            return
        for stem, stack in zip(("w13", "w2"), both, strict=True):
            # One by one: unpacking takes several times the memory of what it unpacks.
            count = stack.codes.shape[0]
            plain = torch.stack([dequantise(stack[expert], self.dtype) for expert in range(count)])
            layer.register_parameter(f"{stem}_weight", nn.Parameter(plain, requires_grad=False))
        super().process_weights_after_loading(layer)

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """[R, H] -> [R, H], of this rank's experts."""
        if not self.packed:
            return super().apply(
                layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input
            )
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids]
        gate_up, down = self.packed
        return product.experts(x, gate_up, down, weights=topk_weights, ids=ids)


def stays_packed(dtype: torch.dtype) -> bool:
    """Whether matrices that multiply activations of this dtype are kept packed on this host."""
    return dtype in native.DTYPES and native.library() is not None


def describe(model: nn.Module, dtype: torch.dtype) -> str | None:
    """What a loaded model's quantised matrices take, in a line; None where it has none."""
    layers = [one for one in model.modules() if isinstance(one, LinearBase | RoutedExperts)]
    every = [layer.quant_method for layer in layers]
    methods = [method for method in every if isinstance(method, HostLinear | HostExperts)]
    if not methods:
        return None
    names = " and ".join(sorted({method.form.name for method in methods}))
    if not stays_packed(dtype):
        return f"{names} weights are dequantised to {dtype}: they take the memory of plain ones."
    matrices = [matrix for method in methods for matrix in method.packed]
    taken = sum(matrix.nbytes for matrix in matrices) / 1e6
    plain = sum(matrix.elements for matrix in matrices) * dtype.itemsize / 1e6
    return f"{names} weights stay packed: {taken:.1f} MB, {plain:.1f} MB as {dtype}."


def _take_parameters(layer: nn.Module) -> dict[str, Tensor]:
    """The layer's own parameters, which it does not have any more."""
    parameters = {name: one.data for name, one in layer.named_parameters(recurse=False)}
    for name in parameters:
        delattr(layer, name)
    return parameters


def _packed(
    where: str, form: WeightForm, parameters: Mapping[str, Tensor], stem: str, row_scale: Tensor
) -> PackedMatrix:
    """A layer's matrix of the parameters whose names begin with `stem`."""
    packed = PackedMatrix(
        codes=parameters[stem + form.codes[0]].view(_BYTE),
        group_scale=parameters[f"{stem}weight_scale"].view(_BYTE) if form.grouped else None,
        row_scale=row_scale.float().contiguous(),
    )
    if packed.has_nan():
        raise CheckpointError(
            f"{where} holds {form.name} weights or scales that are no numbers: the file is damaged "
            "or badly quantised; fetch the checkpoint again."
        )
    return packed


def _refuse_ragged(where: str, inputs: int, form: WeightForm) -> None:
    if form.grouped and inputs % GROUP:
        raise CheckpointError(
            f"{where} has {inputs} inputs on each rank, which are no groups of {GROUP}: NVFP4 "
            "cannot be split so; serve with fewer tensor parallel ranks."
        )


def _described(schemes: list[dict[str, Any] | None]) -> str:
    """What is asked for, in short."""
    asked = {
        f"{args.num_bits} bit {args.type} weights by {args.strategy}"
        + (f" of {args.group_size}" if args.group_size else "")
        for scheme in schemes
        if scheme and (args := scheme["weights"])
    }
    return ", ".join(sorted(asked)) or "no scheme"
