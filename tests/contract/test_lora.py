"""What vLLM's runner, layers and caches ask of adapters is what ours give."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.served import served_config
from vllm.config.lora import LoRAConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

from vllm_diffusion.engine.lora.experts import AdaptedExperts
from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, build_model
from vllm_diffusion.patches import adapter_layers

pytestmark = pytest.mark.vllm

LAYERS = (
    "base_linear.BaseLinearLayerWithLoRA",
    "column_parallel_linear.MergedColumnParallelLinearWithLoRA",
    "column_parallel_linear.MergedQKVParallelLinearWithLoRA",
    "row_parallel_linear.RowParallelLinearWithLoRA",
    "replicated_linear.ReplicatedLinearWithLoRA",
)

STOCK_ROWS = """
import torch
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

rows = PunicaWrapperCPU(8, 4, torch.device("cpu"))
rows.update_metadata(LoRAMapping((1, 0), (1, 0), is_prefill=True), [1, 2], 3, 100)
a, b = torch.ones(2, 1, 4, 8), torch.ones(2, 1, 8, 4)
out = torch.zeros(2, 8)
rows.add_lora_linear(out, torch.ones(2, 8), (a,), (b,), 1.0, (8,))
print("changed" if out[1].any() else "unchanged")
"""


def source(name: str) -> str:
    return inspect.getsource(resolve_name(name))


def test_the_runner_asks_its_manager_for_nothing_that_ours_lacks() -> None:
    from vllm_diffusion.engine.lora.slots import CanvasAdapters

    asked = {
        name
        for module in (
            "lora_model_runner_mixin.LoRAModelRunnerMixin",
            "gpu.model_runner.GPUModelRunner",
        )
        for name in re.findall(r"self\.lora_manager\.(\w+)\(", source(f"vllm.v1.worker.{module}"))
    } - {"create_lora_manager"}  # only where vLLM makes its own
    asked |= set(
        re.findall(
            r"lora_manager\.(\w+)\(", source("vllm.v1.worker.gpu.mm.lora.set_active_mm_loras")
        )
    )
    assert len(asked) > 5, "the test is blind"
    assert {name for name in asked if not hasattr(CanvasAdapters, name)} == set()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_asks_its_rows_for_one_product(name: str) -> None:
    from vllm_diffusion.engine.lora.rows import AdapterRows

    layer = resolve_name(f"vllm.lora.layers.{name}")
    asked = {
        method
        for each in inspect.getmro(layer)
        if each.__module__.startswith("vllm.lora.layers")
        for method in re.findall(r"self\.punica_wrapper\.(\w+)\(", inspect.getsource(each))
    }
    assert asked == {"add_lora_linear"}
    call = source("vllm.lora.layers.base_linear.BaseLinearLayerWithLoRA._apply_lora_to_output")
    assert "output, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices" in call
    assert hasattr(AdapterRows, "add_lora_linear")


def test_a_layer_of_experts_takes_both_matrices_and_hands_them_on() -> None:
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext

    fields = {field.name for field in dataclasses.fields(MoELoRAContext)}
    assert fields >= {
        "w13_lora_a_stacked",
        "w13_lora_b_stacked",
        "w2_lora_a_stacked",
        "w2_lora_b_stacked",
        "punica_wrapper",
    }
    layer = source("vllm.lora.layers.fused_moe.FusedMoE3DWithLoRA")
    assert "w13_lora_a, w2_lora_a = lora_a" in layer
    assert "len(packed_modules_list) == 1" in layer


def test_experts_are_called_with_the_arguments_ours_take() -> None:
    stock = resolve_name(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe.CPUUnquantizedExperts"
    )
    assert list(inspect.signature(stock.apply).parameters)[:8] == [
        "self",
        "output",
        "hidden_states",
        "w1",
        "w2",
        "topk_weights",
        "topk_ids",
        "activation",
    ]


# ---- on GPUs ----

GPU_ROWS = "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU"


def test_the_wrapper_for_gpus_reads_nothing_that_our_rows_leave_unset() -> None:
    """Its methods that layers call, and those that these call."""
    methods = {"add_lora_linear", "add_lora_w13", "add_lora_w2"}
    read: set[str] = set()
    for name in ("add_shrink", "add_expand", "add_lora_fused_moe", "moe_lora_align_block_size"):
        assert any(f"self.{name}(" in source(f"{GPU_ROWS}.{each}") for each in methods)
        methods |= {name}
    for name in methods:
        read |= set(re.findall(r"self\.(\w+)", source(f"{GPU_ROWS}.{name}")))
    assert read - methods == {"token_mapping_meta", "lora_config"}
    linear = inspect.signature(resolve_name(f"{GPU_ROWS}.add_lora_linear"))
    assert list(linear.parameters)[1:7] == [
        *("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices")
    ]
    made = inspect.signature(resolve_name(GPU_ROWS))
    assert list(made.parameters) == ["max_num_batched_tokens", "max_batches", "device", "kwargs"]
    assert 'self.lora_config = kwargs["lora_config"]' in source(f"{GPU_ROWS}.__init__")


def test_kernels_leave_a_slot_without_rows_and_a_place_without_a_slot() -> None:
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    fields = [field.name for field in dataclasses.fields(LoRAKernelMeta)]
    assert fields == [
        "token_lora_mapping",
        "token_indices_sorted_by_lora_ids",
        "active_lora_ids",
        "num_tokens_per_lora",
        "lora_token_start_loc",
        "no_lora_flag_cpu",
        "num_active_loras_cpu",
        "default_num_active_loras_cpu",
        "captured_lora_counts",
    ]
    for name in ("shrink", "expand"):
        module = source(f"vllm.lora.ops.triton_ops.lora_{name}_op")
        assert "if lora_id == -1:" in module
        assert "if cta_m_offset >= lora_m_size:" in module
    experts = source("vllm.lora.ops.triton_ops.fused_moe_lora_op")
    assert "if lora_id < 0:\n        return" in experts
    assert "if pid_m * BLOCK_M >= ntpp:\n            return" in experts


def test_vllms_own_metadata_still_waits_for_the_device() -> None:
    """Why ours is filled otherwise; a fake tensor has no value to wait for."""
    import torch
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    with FakeTensorMode():
        meta = LoRAKernelMeta.make(2, 8, "cpu")
        with pytest.raises(DataDependentOutputException):
            meta.prepare_tensors(torch.zeros(8, dtype=torch.int32))


def test_rows_are_placed_between_the_runners_mapping_and_the_forward() -> None:
    step = source("vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model")
    order = ("self._set_active_loras(", "self.model_state.prepare_inputs(", "run_fullgraph(")
    assert sorted(order, key=step.index) == list(order)
    hook = source("vllm.v1.worker.gpu.lora_utils.create_lora_capture_hook")
    assert "runner.maybe_select_dummy_loras(" in hook


def test_a_layer_counts_the_slots_in_the_options_it_is_given() -> None:
    layer = source("vllm.lora.layers.fused_moe.FusedMoE3DWithLoRA.create_lora_weights")
    assert "self.max_loras = lora_config.max_loras" in layer
    context = source("vllm.lora.layers.fused_moe.FusedMoEWithLoRA._build_lora_context")
    assert "max_loras=self.max_loras" in context


@pytest.mark.parametrize(
    ("targets", "diffusion", "free_cpu", "expected"),
    [
        (None, True, False, "LoRA"),
        (["experts"], True, False, "LoRA"),
        (["o_proj"], True, False, "plain"),
        (["o_proj"], True, True, "plain"),
        (["o_proj"], False, True, "LoRA"),
        (None, True, True, "ours"),
    ],
)
def test_experts_that_no_adapter_changes_keep_their_kernel(
    monkeypatch: pytest.MonkeyPatch,
    targets: list[str] | None,
    expected: str,
    *,
    diffusion: bool,
    free_cpu: bool,
) -> None:
    @dataclasses.dataclass
    class Experts:
        is_lora_enabled: bool = True

    model = SimpleNamespace(
        model="tiny",
        is_diffusion=diffusion,
        quantization=None,
        hf_config=served_config(),
        hf_text_config=build_model(TinySpec()).config.text_config,
    )
    config = SimpleNamespace(model_config=model, lora_config=LoRAConfig(target_modules=targets))
    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: config)
    monkeypatch.setattr(adapter_layers, "is_triton_free_cpu", lambda: free_cpu)
    select = adapter_layers.choose_experts(
        lambda experts: ("LoRA" if experts.is_lora_enabled else "plain", None)
    )
    choice, kernel = select(Experts())
    assert choice == (expected if expected != "ours" else UnquantizedMoeBackend.CPU)
    assert (kernel is AdaptedExperts) == (expected == "ours")


def test_adapted_experts_on_gpus_are_tritons() -> None:
    """FlashInfer's would take gate and up, one matrix here, in the other order."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
    from vllm.model_executor.layers.fused_moe.experts.trtllm_lora_moe import TrtLlmBf16LoRAExperts

    assert TritonExperts.supports_lora()
    assert TritonExperts._supports_activation(MoEActivation.GELU_TANH)
    assert not TrtLlmBf16LoRAExperts._supports_activation(MoEActivation.GELU_TANH)


def test_a_prefix_belongs_to_the_adapter_it_was_computed_with() -> None:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    def keys(adapter: LoRARequest | None) -> Any:
        request = SimpleNamespace(
            lora_request=adapter, mm_features=[], cache_salt=None, prompt_embeds=None
        )
        return generate_block_hash_extra_keys(request, 0, 32, 0)[0]

    found = [keys(LoRARequest("a", 1, "/a")), keys(LoRARequest("b", 2, "/b")), keys(None)]
    found.append(keys(LoRARequest("a", 1, "/b")))
    assert len({str(each) for each in found}) == 4


def test_vllms_own_rows_on_a_cpu_still_give_the_base_model_an_adapter() -> None:
    """Why our rows stand for them; in a process without patches."""
    run = subprocess.run(
        [sys.executable, "-c", STOCK_ROWS], capture_output=True, text=True, timeout=240, check=False
    )
    assert run.stdout.splitlines()[-1:] == ["changed"], run.stderr[-2000:]
