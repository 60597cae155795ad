"""Linear layers and experts of a quantised checkpoint on a CPU host, with packed matrices.

Activations are not quantised. Where the C++ part is not built, or in float16, matrices are
dequantised when they are loaded and run as plain ones. `configuration` chooses the layers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch
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
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
    PerTensorScaleParameter,
)
from vllm.model_executor.utils import set_weight_attrs

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.quant import native, product
from vllm_diffusion.quant.packed import GROUP, PackedMatrix, dequantise

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.engine.packed_layers.forms import WeightForm

_BYTE: Final = torch.uint8


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
                data=torch.empty(rows, 1, dtype=torch.float32), output_dim=0, weight_loader=loader
            )
            layer.register_parameter("weight_scale", scale)
            return
        groups = torch.empty(rows, inputs // GROUP, dtype=torch.float8_e4m3fn)
        layer.register_parameter("weight_scale", GroupQuantScaleParameter(data=groups, **sides))
        for name in self.form.whole_scales:
            whole = torch.empty(len(self.parts), dtype=torch.float32)
            layer.register_parameter(
                name, PerTensorScaleParameter(data=whole, weight_loader=loader)
            )

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Take the parameters off the layer, and keep the matrix they make.

        Raises:
            CheckpointError: a code or a scale is no number.
        """
        parameters = _take_parameters(layer)
        if self.form.grouped:
            parts = torch.tensor(self.parts)
            factor = self.form.factor(parameters[self.form.whole_scales[0]])
            row_scale = factor.repeat_interleave(parts)
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
            for whole in self.form.whole_scales:
                register(f"{stem}_{whole}", parts, torch.float32, kinds.TENSOR.value)

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
                whole = parameters[f"{stem}{self.form.whole_scales[0]}"].view(experts, -1)
                factor = self.form.factor(whole)
                row_scale = factor.repeat_interleave(rows // factor.shape[1], dim=1)
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
