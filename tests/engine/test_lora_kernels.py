"""Adapters on GPUs: which rows vLLM's kernels are given, and what these kernels make of them.

The kernels run in Triton's interpreter, in one subprocess that runs this very file (the interpreter
is chosen when Triton is imported), in float16: the interpreter reads bfloat16 through a pointer
from a table, which products of several slices take, wrongly. The truth is fp64, and what our form
for CPUs makes of the same numbers is the measure of an error.
"""

from __future__ import annotations

import json
import types

import pytest
import torch
from helpers.interpreter import interpreted

SLOTS = 4
RANK = 8
CPU = torch.device("cpu")

# Slots of the rows of a forward: of two adapters 0 and 1 for text, 2 and 3 for canvases.
BATCHES = {
    "mixed": [0, 0, 0, -1, -1, 2, 2, 2, 2, 3, 3, 3, 1, -1, 2, 0],
    "one adapter": [2] * 9,
    "none": [-1] * 5,
    "text and canvas of one": [1, 1, 1, 3, 3, 3],
    "two rows": [3, 0],
}


def make_rows():
    from helpers import adapter_kernels
    from vllm.config.lora import LoRAConfig

    lora = LoRAConfig(max_loras=SLOTS // 2, max_lora_rank=RANK, lora_dtype=torch.float16)
    return adapter_kernels.make_rows(lora, 40)


# ---- in the interpreter ----


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).half()


def linear_errors(batch, sizes):
    """Root mean square errors of the kernels and of our form for CPUs: a layer of these slices."""
    from vllm_diffusion.engine.lora.rows import AdapterRows

    slots = torch.tensor(batch, dtype=torch.int32)
    # Rows behind those of the batch pad a captured graph.
    x, y = draw(len(batch) + 3, 48, seed=1), draw(len(batch) + 3, sum(sizes), seed=2)
    a = tuple(draw(SLOTS, 1, RANK, 48, seed=3 + i) for i in range(len(sizes)))
    b = tuple(draw(SLOTS, 1, size, RANK, seed=9 + i) for i, size in enumerate(sizes))
    truth = y.double()
    for row, slot in enumerate(batch):
        if slot >= 0:
            change = [
                q[slot, 0].double() @ (p[slot, 0].double() @ x[row].double())
                for p, q in zip(a, b, strict=True)
            ]
            truth[row] += torch.cat(change)
    kernels, plain = make_rows(), AdapterRows()
    kernels.assign(torch.full((20,), 3, dtype=torch.int32))  # a larger batch went before
    errors = []
    for rows in (kernels, plain):
        rows.assign(slots)
        out = y.clone()
        rows.layers.add_lora_linear(out, x, a, b, 1.0, sizes)
        untouched = [row for row in range(len(x)) if row >= len(batch) or batch[row] < 0]
        assert torch.equal(out[untouched], y[untouched])
        errors.append(float((out.double() - truth).square().mean().sqrt()))
    return errors


def align(*arguments):
    """What vLLM's compiled operator writes: a slot's rows by expert, each padded to a block.

    It looks at as many places as there are slots, so at none behind them.
    """
    topk_ids, mapping, experts, block, max_loras, max_padded, max_blocks = arguments[:7]
    sorted_ids, expert_ids, padded, enabled, lora_ids, expert_map = arguments[7:]
    assert expert_map is None
    for slot in lora_ids[:max_loras].tolist():
        if slot < 0 or not enabled[slot]:
            continue
        rows, owners = [], []
        for expert in range(experts):
            own = ((topk_ids == expert) & (mapping[: len(topk_ids)] == slot)[:, None]).flatten()
            own = own.nonzero().flatten().tolist()
            blocks = -(-len(own) // block)
            rows += own + [topk_ids.numel()] * (blocks * block - len(own))
            owners += [expert] * blocks
        assert len(rows) <= max_padded
        sorted_ids[slot * max_padded :][: len(rows)] = torch.tensor(rows, dtype=torch.int32)
        expert_ids[slot * max_blocks :][: len(owners)] = torch.tensor(owners, dtype=torch.int32)
        padded[slot] = len(rows)


def expert_errors(batch):
    """The same for experts: vLLM's two hooks around plain products, against ours for CPUs."""
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.lora_context import MoELoRAContext
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

    from vllm_diffusion.engine.lora.experts import AdaptedExperts
    from vllm_diffusion.engine.lora.rows import AdapterRows

    experts, hidden, inner, top = 8, 32, 16, 2
    slots = torch.tensor(batch, dtype=torch.int32)
    x, w1 = draw(len(batch), hidden, seed=1), draw(experts, 2 * inner, hidden, seed=2) / 6
    w2 = draw(experts, hidden, inner, seed=3) / 4
    weights = draw(len(batch), top, seed=4).float().softmax(-1)
    ids = torch.stack([torch.randperm(experts)[:top] for _ in batch]).int()
    factors = {
        "w13_lora_a_stacked": (draw(SLOTS, experts, RANK, hidden, seed=5),),
        "w13_lora_b_stacked": (draw(SLOTS, experts, 2 * inner, RANK, seed=6) / 16,),
        "w2_lora_a_stacked": (draw(SLOTS, experts, RANK, inner, seed=7),),
        "w2_lora_b_stacked": (draw(SLOTS, experts, hidden, RANK, seed=8) / 16,),
    }

    def gated(both):
        gate, up = both.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up

    truth = torch.zeros(len(batch), hidden, dtype=torch.float64)
    (a1,), (b1,), (a2,), (b2,) = factors.values()
    for row, slot in enumerate(batch):
        for expert, weight in zip(ids[row].tolist(), weights[row].double(), strict=True):
            up, down = w1[expert].double(), w2[expert].double()
            if slot >= 0:
                up = up + b1[slot, expert].double() @ a1[slot, expert].double()
                down = down + b2[slot, expert].double() @ a2[slot, expert].double()
            truth[row] += weight * (down @ gated(up @ x[row].double()))

    rows = make_rows()
    rows.assign(slots)
    enabled = torch.tensor([1] * SLOTS + [0], dtype=torch.int32)
    context = MoELoRAContext(
        **factors,
        adapter_enabled=enabled,
        max_loras=SLOTS,
        top_k=top,
        w13_num_slices=1,
        fully_sharded=False,
        tp_rank=0,
        tp_size=1,
        local_num_experts=experts,
        punica_wrapper=rows.layers,
        use_tuned_config=False,
    )
    hooks = LoRAExpertsMixin()
    hooks.moe_config = types.SimpleNamespace(activation=MoEActivation.GELU_TANH)
    common = {
        "topk_weights": weights,
        "w1": w1,
        "w2": w2,
        "num_tokens": len(batch),
        "top_k_num": top,
    }
    first = torch.einsum("rkoh,rh->rko", w1[ids].float(), x.float()).half()
    names = (
        "sorted_token_ids_lora",
        "expert_ids_lora",
        "num_tokens_post_padded_lora",
        "token_lora_mapping",
    )
    found = hooks.apply_w13_lora(context, y=first, x=x, topk_ids=ids, expert_map=None, **common)
    middle = gated(first).flatten(0, 1)
    last = torch.einsum("rkhi,rki->rkh", w2[ids].float(), gated(first).float())
    last = (last * weights[..., None]).half()
    hooks.apply_w2_lora(context, y=last, x=middle, **dict(zip(names, found, strict=True)), **common)
    kernels = last.sum(1)

    plain = AdapterRows()
    plain.assign(slots)
    ours = AdaptedExperts.__new__(AdaptedExperts)
    ours._lora_context = types.SimpleNamespace(punica_wrapper=plain, **factors)
    output = torch.empty_like(x)
    ours.apply(output, x, w1, w2, weights, ids, MoEActivation.GELU_TANH)
    return [float((each.double() - truth).square().mean().sqrt()) for each in (kernels, output)]


def in_the_interpreter():
    # Without a device vLLM takes Triton for absent, unless Triton has a backend named "cpu".
    from triton.backends import backends

    driver = types.SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
    from vllm import _custom_ops
    from vllm.lora.ops.triton_ops import lora_shrink_op

    _custom_ops.moe_lora_align_block_size = align
    # The interpreter runs one program after the other; 64 parts of a sum would be most of them.
    stock = lora_shrink_op.get_lora_op_configs
    lora_shrink_op.get_lora_op_configs = lambda *args, **more: stock(*args, **more) | {"split_k": 2}
    errors = {}
    for name, batch in BATCHES.items():
        errors[f"{name}, one slice"] = linear_errors(batch, (40,))
        errors[f"{name}, three slices"] = linear_errors(batch, (64, 32, 32))
        errors[f"{name}, experts"] = expert_errors(batch)
    print(json.dumps(errors))


@pytest.fixture(scope="module")
def errors():
    return json.loads(interpreted(__file__))


@pytest.mark.vllm
@pytest.mark.parametrize("what", ["one slice", "three slices", "experts"])
@pytest.mark.parametrize("batch", BATCHES)
def test_kernels_are_as_exact_as_our_form_for_cpus(errors, batch, what):
    kernels, ours = errors[f"{batch}, {what}"]
    assert kernels <= 1.5 * ours + 1e-9


# ---- which rows they are given ----


@pytest.fixture
def kernels(monkeypatch):
    """vLLM's wrapper for GPUs where Triton is absent."""
    pytest.importorskip("vllm")
    from helpers import adapter_kernels

    adapter_kernels.install(monkeypatch)


def seen(meta):
    from helpers.adapter_kernels import rows_by_slot

    return rows_by_slot(meta.meta_args(40, specialize_active_lora=False))


def expected(batch):
    return {
        slot: [row for row, each in enumerate(batch) if each == slot]
        for slot in sorted(set(batch) - {-1})
    }


@pytest.mark.vllm
@pytest.mark.usefixtures("kernels")
def test_kernels_find_the_rows_of_every_slot_and_vllms_own_metadata_says_the_same():
    from vllm.lora.ops.triton_ops import LoRAKernelMeta

    rows = make_rows()
    meta = rows.layers.token_mapping_meta
    addresses = [each.data_ptr() for each in vars(meta).values() if torch.is_tensor(each)]
    for batch in (*BATCHES.values(), [3] * 40, [0, 1]):
        slots = torch.tensor(batch, dtype=torch.int32)
        rows.assign(slots)
        assert seen(meta) == expected(batch)
        assert meta.token_lora_mapping.tolist() == batch + [-1] * (40 - len(batch))
        theirs = LoRAKernelMeta.make(SLOTS, 40, CPU)
        theirs.prepare_tensors(slots)
        assert seen(theirs) == seen(meta)
        # The last place is that of rows without an adapter, which not all kernels look at.
        assert meta.active_lora_ids.tolist() == [*range(SLOTS), -1]
    rows.clear()
    assert seen(meta) == {}
    # Captured graphs read what stands there now.
    assert addresses == [each.data_ptr() for each in vars(meta).values() if torch.is_tensor(each)]


def make_adapters(text_config, device):
    """Two adapters, 7 and 9, of a model without layers."""
    from helpers.served import served_config
    from vllm.config.lora import LoRAConfig

    from vllm_diffusion.engine.lora.slots import CanvasAdapters

    config = types.SimpleNamespace(
        lora_config=LoRAConfig(max_loras=SLOTS // 2, max_lora_rank=RANK, lora_dtype=torch.float16),
        model_config=types.SimpleNamespace(
            model="tiny",
            quantization=None,
            hf_config=served_config(),
            hf_text_config=text_config,
        ),
        scheduler_config=types.SimpleNamespace(max_num_batched_tokens=36),
    )
    adapters = CanvasAdapters(torch.nn.Module(), config, device)
    for number in (7, 9):
        adapters.add_dummy_lora(types.SimpleNamespace(lora_int_id=number), RANK)
    return adapters


def activate(adapters, *rows):
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.request import LoRARequest

    asked = [LoRARequest(str(row), row, "/none") for row in dict.fromkeys(rows) if row]
    adapters.set_active_adapters(asked, LoRAMapping(rows, rows, is_prefill=True))


@pytest.fixture(scope="module")
def text_config():
    from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, build_model

    return build_model(TinySpec()).config.text_config


CANVAS = torch.tensor([[row in {1, 2, 3, 5, 6}] for row in range(9)])
LOGITS = torch.tensor([1, 2, 3, 4, 5, 6])


@pytest.mark.vllm
@pytest.mark.usefixtures("kernels")
def test_text_rows_and_canvas_rows_of_an_adapter_have_slots_of_their_own(text_config):
    rows, conditioning = make_rows(), make_rows()
    adapters = make_adapters(text_config, CPU)
    adapters.take_rows(rows, conditioning)
    text, canvas = (each.layers.token_mapping_meta for each in (rows, conditioning))
    activate(adapters, 7, 7, 0, 7, 9, 9, 0)
    assert (seen(text), seen(canvas)) == ({0: [0, 1, 3], 1: [4, 5]}, {})
    adapters.place(CANVAS, LOGITS)
    assert seen(text) == {0: [0], 1: [4], 2: [1, 3], 3: [5]}
    assert seen(canvas) == {1: [3], 2: [0, 2], 3: [4]}
    activate(adapters, 0, 0, 0)
    adapters.place(CANVAS, LOGITS[:2])
    assert (seen(text), seen(canvas)) == ({}, {})


@pytest.mark.vllm
@pytest.mark.usefixtures("kernels")
def test_no_row_is_read_on_the_host_and_no_tensor_is_on_the_wrong_side(monkeypatch, text_config):
    """Fake tensors of another device: what mixes devices, or waits for a value, raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    from vllm_diffusion.engine.lora import slots as lora_slots

    # A CPU worker that ran in this process has replaced vLLM's by one that copies to no device.
    monkeypatch.setattr(
        lora_slots, "async_tensor_h2d", lambda data, device: torch.from_numpy(data).to(device)
    )
    with FakeTensorMode():
        adapters = make_adapters(text_config, torch.device("meta"))
        activate(adapters, 7, 7, 0, 7, 9, 9, 0)
        slots = adapters._text_slots
        assert slots.device.type == "meta"
        canvas = torch.ones(9, 1, dtype=torch.bool, device="meta")
        adapters.place(canvas, torch.arange(3, device="meta"))
        meta = adapters._conditioning_rows.layers.token_mapping_meta
        assert meta.token_lora_mapping.shape == (40,)
        assert meta.token_lora_mapping.device.type == "meta"
        assert meta.no_lora_flag_cpu.device.type == "cpu"
        with pytest.raises(DataDependentOutputException):
            bool(slots.any())


@pytest.mark.vllm
def test_options_of_layers_and_kernels_name_every_slot():
    from vllm.config.lora import LoRAConfig

    from vllm_diffusion.engine.lora.kernels import with_slots

    asked = LoRAConfig(max_loras=3, max_lora_rank=RANK, max_cpu_loras=4)
    given = with_slots(asked, 6)
    assert (given.max_loras, given.max_cpu_loras, given.max_lora_rank) == (6, 6, RANK)
    assert (asked.max_loras, asked.max_cpu_loras) == (3, 4)


if __name__ == "__main__":
    in_the_interpreter()
