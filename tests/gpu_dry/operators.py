"""What else has to stand in for a GPU: vLLM's compiled operators, its loader, its collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from gpu_dry import flash
from gpu_dry.kernels import IN_PLACE
from gpu_dry.tensors import META, PYTHON, STAND_INS, DeviceTensor, wrapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpu_dry.graphs import Machine


def stand_in(machine: Machine) -> list[str]:
    """Import vLLM and replace what needs a device in it; the list fills with what was left out."""
    import vllm.utils.torch_utils as tensors_of_vllm

    register = tensors_of_vllm.direct_register_custom_op

    def direct_register_custom_op(op_name: str, op_func: Any, *args: Any, **options: Any) -> Any:
        library = options.get("target_lib")
        PYTHON[f"{library.ns if library else 'vllm'}::{op_name}"] = op_func
        return register(op_name, op_func, *args, **options)

    tensors_of_vllm.direct_register_custom_op = direct_register_custom_op

    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import buffer_utils

    for platform in type(current_platform).__mro__:
        if "dist_backend" in vars(platform):
            platform.dist_backend = "gloo"

    def view_of(tensor: torch.Tensor) -> DeviceTensor:
        """Memory of the host that kernels read in place."""
        return DeviceTensor(tensor if machine.values else tensor.to(META))

    tensors_of_vllm.get_accelerator_view_from_cpu_tensor = view_of
    buffer_utils.get_accelerator_view_from_cpu_tensor = view_of
    left_out: list[str] = []
    _load_on_the_host(machine, left_out)
    flash.stand_in(machine)
    _router_products()
    if not machine.values:
        import vllm.model_executor.layers.fused_moe.runner.moe_runner  # noqa: F401 -- registers
        from vllm.v1.worker import gpu_worker

        PYTHON["vllm::moe_forward"] = lambda hidden, *_: torch.empty_like(hidden)
        gpu_worker.kernel_warmup = lambda *_: None  # of experts' kernels, which are not run
    return left_out


def _router_products() -> None:
    """vLLM's products for a few rows are CuTe, compiled where they are launched."""
    from vllm.model_executor.kernels.linear.cute_dsl import ll_bf16, ll_fp32w

    def product(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.nn.functional.linear(x.float(), weight.float())

    ll_bf16.ll_bf16_gemm = product
    ll_fp32w.is_available = lambda: False


def _load_on_the_host(machine: Machine, left_out: list[str]) -> None:
    """Weights are made in host memory, or as shapes, and go to the device when they are there.

    vLLM's parameter classes cannot wrap wrapper tensors.
    """
    from vllm.model_executor.model_loader import base_loader

    original = base_loader.BaseModelLoader.load_model

    def load_model(self: Any, vllm_config: Any, model_config: Any, *args: Any, **rest: Any) -> Any:
        self.load_config.device = "cpu" if machine.values else "meta"
        if not machine.values:
            self.load_weights = lambda *_, **__: None
            base_loader.process_weights_after_loading = _without_values(left_out)
        with _disable_current_modes():
            model = original(self, vllm_config, model_config, *args, **rest)
        return wrapped(model)

    base_loader.BaseModelLoader.load_model = load_model


def _without_values(left_out: list[str]) -> Callable[..., None]:
    """`process_weights_after_loading` for shapes: packed weights stay as the file has them.

    What vLLM makes of them needs their numbers. Their layers' products are vLLM's own and are not
    run: they answer with the shape.
    """
    from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
    from vllm.model_executor.model_loader.utils import maybe_retie_word_embeddings

    def process(model: torch.nn.Module, model_config: Any, _: Any) -> None:
        maybe_retie_word_embeddings(model, model_config)
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if method is None or isinstance(method, UnquantizedLinearMethod):
                continue
            if isinstance(method, LinearMethodBase):
                left_out.append(type(method).__name__)
                method.apply = _shape_of_product
        for module in model.modules():
            if hasattr(module, "process_weights_after_loading") and hasattr(module, "kv_cache"):
                module.process_weights_after_loading(model_config.dtype)
        if hasattr(model, "process_weights_after_loading"):
            model.process_weights_after_loading()

    return process


def _shape_of_product(layer: Any, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
    del bias
    return x.new_empty(*x.shape[:-1], layer.output_size_per_partition, dtype=torch.bfloat16)


# ---- compiled operators, on host tensors ----


def stands_in_for(name: str) -> Callable[[Any], Any]:
    def keep(function: Any) -> Any:
        STAND_INS[name] = function
        return function

    return keep


@stands_in_for("_C::weak_ref_tensor")
def _weak(tensor: torch.Tensor) -> torch.Tensor:
    """Nothing is freed behind a simulated graph."""
    return tensor


@stands_in_for("_moe_C::moe_align_block_size")
def _align(  # noqa: PLR0917 -- its signature
    chosen: torch.Tensor,
    num_experts: int,
    size: int,
    sorted_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    padded: torch.Tensor,
    expert_map: torch.Tensor | None = None,
    *_: Any,
) -> None:
    """Rows by expert, every expert's padded to whole blocks."""
    flat = chosen.flatten().long()
    sorted_ids.fill_(flat.numel())
    blocks: list[int] = []
    for expert in range(num_experts):
        rows = (flat == expert).nonzero()[:, 0]
        place = len(blocks) * size
        sorted_ids[place : place + len(rows)] = rows.to(sorted_ids.dtype)
        blocks += [expert] * -(-len(rows) // size)
    expert_ids.fill_(-1)
    expert_ids[: len(blocks)] = torch.tensor(blocks, dtype=expert_ids.dtype)
    assert expert_map is None
    padded.fill_(len(blocks) * size)


def _experts(_: Any, *args: Any, **options: Any) -> None:
    """vLLM's grouped product: nothing of ours to test in it, and minutes in the interpreter."""
    a, b, c, _, _, _, weights, ids, experts, padded = args[:10]
    valid, top_k, size = args[13], options["top_k"], options["BLOCK_SIZE_M"]
    out, factor = c.view(-1, c.shape[-1]), None if weights is None else weights.flatten()
    for place in range(0, int(padded), size):
        expert = int(experts[place // size])
        rows = ids[place : place + size].long()
        rows = rows[rows < valid]
        if expert >= 0 and len(rows):
            y = a[rows // top_k] @ b[expert].T
            y = y * factor[rows, None] if options["MUL_ROUTED_WEIGHT"] else y
            out[rows] = y.to(out.dtype)


IN_PLACE["fused_moe_kernel"] = _experts


@stands_in_for("_moe_C::moe_sum")
def _sum(x: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(x.sum(dim=1))


@stands_in_for("_C::gelu_tanh_and_mul")
def _gated(out: torch.Tensor, x: torch.Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(torch.nn.functional.gelu(gate, approximate="tanh") * up)


@stands_in_for("_C::rms_norm")
def _norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> None:
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    out.copy_(y if weight is None else y * weight.float())


@stands_in_for("_C_cache_ops::reshape_and_cache_flash")
def _cache(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    *_: Any,
) -> None:
    used = slots >= 0
    slot, size = slots[used].long(), keys.shape[1]
    keys[slot // size, slot % size] = key[: len(slots)][used].to(keys.dtype)
    values[slot // size, slot % size] = value[: len(slots)][used].to(values.dtype)
