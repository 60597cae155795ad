"""Adapters of a worker without an engine: slots, caches, and the product for every row."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.served import FAMILY, served_config
from torch import nn
from vllm.config.lora import LoRAConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from vllm_diffusion.engine.lora import admission as lora
from vllm_diffusion.engine.lora import slots as lora_slots
from vllm_diffusion.engine.lora.experts import AdaptedExperts
from vllm_diffusion.engine.lora.rows import AdapterRows
from vllm_diffusion.engine.lora.slots import CanvasAdapters
from vllm_diffusion.errors import AdapterError, ConfigError
from vllm_diffusion.models.diffusion_gemma.adapter_form import DiffusionGemmaAdapters
from vllm_diffusion.models.diffusion_gemma.testing.adapters import DECODER, write_adapter
from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, build_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_diffusion.engine.lora.form import Located

pytestmark = pytest.mark.vllm

SLOTS = 2


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_checkpoint, only=("q_proj",))


@pytest.fixture
def make() -> Callable[..., CanvasAdapters]:
    def adapters(**options: int) -> CanvasAdapters:
        config = SimpleNamespace(
            lora_config=LoRAConfig(max_loras=SLOTS, lora_dtype=torch.float32, **options),
            model_config=SimpleNamespace(
                model="tiny",
                quantization=None,
                hf_config=served_config(),
                hf_text_config=build_model(TinySpec()).config.text_config,
            ),
        )
        return CanvasAdapters(nn.Module(), config, torch.device("cpu"))

    return adapters


def requests(folder: Path, *numbers: int) -> list[LoRARequest]:
    return [LoRARequest(f"adapter {number}", number, str(folder)) for number in numbers]


def slots(adapters: CanvasAdapters) -> dict[int, list[int]]:
    return {slot: rows.tolist() for slot, rows in adapters._rows.groups}


def activate(adapters: CanvasAdapters, folder: Path, *rows: int) -> dict[int, list[int]]:
    asked = requests(folder, *dict.fromkeys(row for row in rows if row))
    adapters.set_active_adapters(asked, LoRAMapping(rows, rows, is_prefill=True))
    return slots(adapters)


def test_rows_are_text_until_they_are_placed(
    make: Callable[..., CanvasAdapters], folder: Path
) -> None:
    adapters = make()
    assert activate(adapters, folder, 7, 7, 0, 7, 9) == {0: [0, 1, 3], 1: [4]}
    canvas = torch.tensor([False, True, True, True, False, True])[:, None]
    adapters.place(canvas, torch.tensor([1, 2, 3]))
    assert slots(adapters) == {0: [0], 1: [4], SLOTS: [1, 3]}
    assert [(slot, rows.tolist()) for slot, rows in adapters._conditioning_rows.groups] == [
        (SLOTS, [0, 2])
    ]


class OneTree(DiffusionGemmaAdapters):
    """Adapters whose factors are for text and canvas rows alike."""

    row_kinds = ("any",)

    def names(self, folder: Path, config: Any) -> Callable[[str], Located | None]:
        meaning = super().names(folder, config)
        return lambda module: (place := meaning(module)) and place._replace(kinds=self.row_kinds)


def test_rows_share_a_slot_where_they_share_their_factors(
    make: Callable[..., CanvasAdapters],
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "adapter_form", lambda _: OneTree())
    folder = write_adapter(tmp_path, tiny_checkpoint, only=("q_proj",), trees=(DECODER,))
    adapters = make()
    activate(adapters, folder, 7, 7, 0, 9)
    adapters.place(torch.tensor([False, True, True, True])[:, None], torch.tensor([1]))
    assert slots(adapters) == {0: [0, 1], 1: [3]}
    assert {kind: len(paths) for kind, paths in adapters._loaded[7].items()} == {"any": 3}


def test_what_was_used_longest_ago_loses_its_slot(
    make: Callable[..., CanvasAdapters], folder: Path
) -> None:
    adapters = make(max_cpu_loras=3)
    activate(adapters, folder, 1, 2)
    activate(adapters, folder, 1)
    assert activate(adapters, folder, 3) == {1: [0]}
    assert adapters.list_adapters() == {1, 2, 3}
    activate(adapters, folder, 4)
    assert adapters.list_adapters() == {1, 3, 4}


def test_a_pinned_adapter_stays(make: Callable[..., CanvasAdapters], folder: Path) -> None:
    adapters = make()
    activate(adapters, folder, 1)
    assert adapters.pin_adapter(1)
    for number in (2, 3, 4):
        activate(adapters, folder, number)
    assert adapters.list_adapters() == {1, 4}
    adapters.pin_adapter(4)
    with pytest.raises(RuntimeError, match="every adapter is pinned"):
        activate(adapters, folder, 5)
    with pytest.raises(ValueError, match="not loaded"):
        adapters.pin_adapter(5)


def test_an_adapter_is_loaded_in_place_when_asked_and_not_with_every_forward(
    make: Callable[..., CanvasAdapters], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    stock = lora_slots.read_adapter
    monkeypatch.setattr(
        lora_slots, "read_adapter", lambda path, *rest: (read.append(path), stock(path, *rest))[1]
    )
    adapters = make()
    request = LoRARequest("adapter", 1, str(folder), load_inplace=True)
    mapping = LoRAMapping((1,), (1,), is_prefill=True)
    assert adapters.add_adapter(request)
    for _ in range(3):
        adapters.set_active_adapters([request], mapping)
    assert len(read) == 1
    adapters.add_adapter(request)
    assert len(read) == 2


def test_factors_of_another_precision_are_multiplied_in_it() -> None:
    x, y = torch.ones(2, 8), torch.zeros(2, 4)
    a, b = torch.ones(1, 1, 2, 8, dtype=torch.bfloat16), torch.ones(1, 1, 4, 2).bfloat16()
    rows = AdapterRows()
    rows.assign(torch.tensor([-1, 0]))
    rows.add_lora_linear(y, x, (a,), (b,), 1.0, (4,))
    assert y.tolist() == [[0.0] * 4, [16.0] * 4]


def test_a_removed_adapter_is_gone(make: Callable[..., CanvasAdapters], folder: Path) -> None:
    adapters = make()
    activate(adapters, folder, 1)
    assert adapters.remove_adapter(1)
    assert not adapters.remove_adapter(1)
    activate(adapters, folder, 2, 3)
    adapters.remove_all_adapters()
    assert adapters.list_adapters() == set()


def test_an_adapter_that_cannot_be_read_leaves_the_others(
    make: Callable[..., CanvasAdapters], folder: Path, tmp_path: Path
) -> None:
    adapters = make()
    activate(adapters, folder, 1, 2)
    with pytest.raises(AdapterError, match=r"there is no adapter_config\.json"):
        adapters.add_adapter(LoRARequest("empty", 3, str(tmp_path)))
    with pytest.raises(LoRAAdapterNotFoundError):
        adapters.add_adapter(LoRARequest("gone", 3, str(tmp_path / "nowhere")))
    assert adapters.list_adapters() == {1, 2}
    assert activate(adapters, folder, 2, 1) == {0: [1], 1: [0]}


def test_every_row_gets_the_product_of_its_slot() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(5, size, generator=generator) for size in (8, 10))
    a = tuple(torch.randn(3, 1, 4, 8, generator=generator) for _ in range(2))
    b = tuple(torch.randn(3, 1, size, 4, generator=generator) for size in (6, 4))
    assigned = [2, -1, 0, 2, -1]
    rows = AdapterRows()
    rows.assign(torch.tensor(assigned))
    expected = y.clone()
    for row, slot in enumerate(assigned):
        if slot >= 0:
            parts = [each_b[slot, 0] @ each_a[slot, 0] for each_a, each_b in zip(a, b, strict=True)]
            expected[row] += torch.cat(parts) @ x[row]
    rows.add_lora_linear(y, x, a, b, 1.0, (6, 4))
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[1], expected[1])


def test_experts_add_the_factors_of_a_rows_slot() -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    w1, w2, x = draw(4, 12, 8), draw(4, 8, 6), draw(5, 8)
    ids = torch.tensor([[0, 1], [1, 3], [0, 3], [1, 0], [3, 1]])
    weights = torch.rand(5, 2, generator=generator)
    rows = AdapterRows()
    assigned = [1, -1, 0, 1, -1]
    rows.assign(torch.tensor(assigned))
    factors = {
        "w13_lora_a_stacked": (draw(2, 4, 3, 8),),
        "w13_lora_b_stacked": (draw(2, 4, 12, 3),),
        "w2_lora_a_stacked": (draw(2, 4, 3, 6),),
        "w2_lora_b_stacked": (draw(2, 4, 8, 3),),
    }
    experts = AdaptedExperts.__new__(AdaptedExperts)
    experts._lora_context = SimpleNamespace(punica_wrapper=rows, **factors)
    output = torch.full((5, 8), float("nan"))
    experts.apply(output, x, w1, w2, weights, ids, MoEActivation.GELU_TANH)
    first_a, first_b, second_a, second_b = (each[0] for each in factors.values())
    for row, slot in enumerate(assigned):
        expected = torch.zeros(8)
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            up, down = w1[expert], w2[expert]
            if slot >= 0:
                up = up + first_b[slot, expert] @ first_a[slot, expert]
                down = down + second_b[slot, expert] @ second_a[slot, expert]
            gate, value = (up @ x[row]).chunk(2)
            hidden = nn.functional.gelu(gate, approximate="tanh") * value
            expected += weight * (down @ hidden)
        torch.testing.assert_close(output[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "option", ["fully_sharded_loras", "enable_tower_connector_lora", "enable_moe_shared_loras"]
)
def test_an_option_that_is_not_served_is_refused(option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option} is not supported"):
        lora.check_options(LoRAConfig(**{option: True}))


def serving(**changes: object) -> SimpleNamespace:
    """What `check_host` reads of a configuration."""
    given = {"experts": False, "dtype": torch.bfloat16, "lora_dtype": "auto", "quantization": None}
    given |= {"family": FAMILY} | changes
    return SimpleNamespace(
        lora_config=LoRAConfig(lora_dtype=given["lora_dtype"]),
        model_config=SimpleNamespace(
            model="tiny",
            dtype=given["dtype"],
            quantization=given["quantization"],
            hf_config=served_config(given["family"]),
            hf_text_config=build_model(TinySpec()).config.text_config,
        ),
        parallel_config=SimpleNamespace(enable_expert_parallel=given["experts"]),
    )


def test_a_host_without_served_adapters_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "adapters_are_served", lambda: False)
    lora.check_host(SimpleNamespace(lora_config=None, model_config=None))
    with pytest.raises(ConfigError, match="only on GPUs and on CPU hosts"):
        lora.check_host(serving())


def test_a_family_without_adapters_says_so() -> None:
    with pytest.raises(ConfigError, match="enable_lora is not supported for diffusion_gemma"):
        lora.check_host(serving(family=replace(FAMILY, adapters=None)))


def test_experts_on_ranks_of_their_own_are_not_adapted() -> None:
    with pytest.raises(ConfigError, match="enable_expert_parallel does not go with"):
        lora.check_host(serving(experts=True))
    lora.check_host(serving(experts=True, quantization="fp8"))


def test_kernels_of_gpus_take_two_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    lora.check_host(serving(dtype=torch.float32))
    monkeypatch.setattr(lora, "adapters_are_served", lambda: True)
    monkeypatch.setattr(lora, "is_triton_free_cpu", lambda: False)
    lora.check_host(serving())
    lora.check_host(serving(lora_dtype=torch.bfloat16))
    for wrong in ({"dtype": torch.float32}, {"lora_dtype": torch.float16}):
        with pytest.raises(ConfigError, match="take bfloat16 or float16"):
            lora.check_host(serving(**wrong))
