"""What vLLM's runner, layers and caches ask of adapters is what ours give."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pkgutil import resolve_name
from typing import Any

import pytest

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
    from vllm_diffusion.engine.lora_rows import CanvasAdapters

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
    from vllm_diffusion.engine.lora_rows import AdapterRows

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


def test_a_prefix_belongs_to_the_adapter_it_was_computed_with() -> None:
    from types import SimpleNamespace

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
