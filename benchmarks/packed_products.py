"""Matrix products with packed weights beside bf16 ones on a CPU: time and memory, in one run.

    python benchmarks/packed_products.py [--quick] [--json FILE] [--rows N ...] [--panel N ...]

    linear     [R, 2816] x [4224, 2816]: gate and up of the released model's dense MLP
    experts    32 of the released model's experts (2816, 704), 8 a row, weights of router alike

    vllm bf16  what vLLM runs for plain weights: its prepacked oneDNN product, its fused experts
    torch bf16 torch's product with the plain matrix; experts one after the other
    nvfp4, fp8 ours, weights packed; `panel` is the rows unpacked at a time

Seconds are those of the processor over all threads; the ways take turns, and the fastest of nine
runs counts. MB is what the weights take, `of bf16` its share of the plain ones'.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import _report
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_diffusion.quant import native
from vllm_diffusion.quant.packed import GROUP, PackedMatrix, dequantise
from vllm_diffusion.quant.product import PANEL, experts, linear

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN, DENSE, INNER = 2816, 2112, 704
EXPERTS, CHOSEN = 32, 8
RUNS = 9
ISA = "vec"  # vLLM's portable fused experts; "amx" where the processor has it
FORMS = ("nvfp4", "fp8")


def main() -> None:
    """Run every cell and print it."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--rows", type=int, nargs="+", default=[4, 16, 64, 256])
    arguments.add_argument("--panel", type=int, nargs="+", default=[PANEL])
    options = arguments.parse_args()
    if options.quick:
        options.rows = [64]
    assert native.library() is not None, "the C++ part is not built"
    torch.manual_seed(0)
    table = []
    for kind, make in (("linear", linear_ways), ("experts", expert_ways)):
        for rows in options.rows:
            ways = make(rows, options.panel)
            times = fastest({name: run for name, (run, _) in ways.items()})
            plain = ways["vllm bf16"][1]
            table += [
                {
                    "product": kind,
                    "R": rows,
                    "weights": name,
                    "cpu ms": 1e3 * times[name],
                    "of vllm": times[name] / times["vllm bf16"],
                    "MB": held / 1e6,
                    "of bf16": held / plain,
                }
                for name, (_, held) in ways.items()
            ]
    _report.print_table(table)
    flat = {
        f"{row['product']}.{row['R']}.{row['weights']}.{key}": row[key]
        for row in table
        for key in ("cpu ms", "of vllm", "MB", "of bf16")
    }
    _report.finish(flat, headline(table), options.json)


def headline(table: list[dict[str, Any]]) -> str:
    """NVFP4 at 64 rows."""
    rows = [row for row in table if row["R"] == 64 and row["weights"].startswith("nvfp4")]
    return "; ".join(
        f"{row['product']} of {row['weights']} at 64 rows: {row['of vllm']:.2f} of the time, "
        f"{row['of bf16']:.2f} of the memory of bf16"
        for row in rows
    )


def fastest(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor seconds of each way, the ways taking turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(RUNS):
        for name, run in ways.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - begin)
    return best


Ways = dict[str, tuple["Callable[[], object]", int]]


def linear_ways(rows: int, panels: list[int]) -> Ways:
    """Of each way a run and the bytes of its weights."""
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    matrices = {form: random_matrix(form, 2 * DENSE, HIDDEN) for form in FORMS}
    plain = dequantise(matrices["nvfp4"], torch.bfloat16)
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(plain.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    ways: Ways = {
        "vllm bf16": (lambda: layer.cpu_linear(x, layer.weight, None), plain.nbytes),
        "torch bf16": (lambda: F.linear(x, plain), plain.nbytes),
    }
    for form, matrix in matrices.items():
        for panel in panels:
            ways[label(form, panel, panels)] = (
                lambda matrix=matrix, panel=panel: linear(x, matrix, panel=panel),
                matrix.nbytes,
            )
    return ways


def expert_ways(rows: int, panels: list[int]) -> Ways:
    """Of each way a run and the bytes of its weights."""
    del panels
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(rows)])
    weights = torch.rand(rows, CHOSEN)
    packed = {
        form: (
            random_matrix(form, 2 * INNER, HIDDEN, EXPERTS),
            random_matrix(form, HIDDEN, INNER, EXPERTS),
        )
        for form in FORMS
    }
    both = [
        torch.stack([dequantise(stack[expert], torch.bfloat16) for expert in range(EXPERTS)])
        for stack in packed["nvfp4"]
    ]
    ready = SimpleNamespace(
        gate_up=ops.cpu_prepack_moe_weight(both[0], ISA),
        down=ops.cpu_prepack_moe_weight(both[1], ISA),
        output=torch.empty_like(x),
    )

    def fused() -> None:
        ops.cpu_fused_moe(
            ready.output,
            x,
            ready.gate_up,
            ready.down,
            None,
            None,
            weights,
            ids.int(),
            "gelu_tanh",
            ISA,
            False,
        )

    def one_by_one() -> Tensor:
        total = torch.zeros(x.shape)
        for number in range(EXPERTS):
            of_it, places = (ids == number).nonzero(as_tuple=True)
            gate, up = F.linear(x[of_it], both[0][number]).float().chunk(2, dim=-1)
            inner = (F.gelu(gate, approximate="tanh") * up).bfloat16()
            each = F.linear(inner, both[1][number]).float() * weights[of_it, places, None]
            total.index_add_(0, of_it, each)
        return total

    held = sum(one.nbytes for one in both)
    ways: Ways = {"vllm bf16": (fused, held), "torch bf16": (one_by_one, held)}
    for form, stacks in packed.items():
        ways[form] = (
            lambda stacks=stacks: experts(x, *stacks, weights=weights, ids=ids),
            sum(stack.nbytes for stack in stacks),
        )
    return ways


def label(form: str, panel: int, panels: list[int]) -> str:
    """A way's name, with its panel where there are several."""
    return form if len(panels) == 1 else f"{form}/{panel}"


def random_matrix(form: str, rows: int, inputs: int, experts: int | None = None) -> PackedMatrix:
    """Weights of a size that keeps activations near one."""
    stack = () if experts is None else (experts,)

    def draw(*shape: int, low: int = 0, high: int = 256) -> Tensor:
        return torch.randint(low, high, (*stack, *shape), dtype=torch.uint8)

    size = torch.rand((*stack, rows)) / inputs**0.5
    if form == "nvfp4":
        scale = draw(rows, inputs // GROUP, low=40, high=72)
        return PackedMatrix(codes=draw(rows, inputs // 2), group_scale=scale, row_scale=size / 4)
    codes = draw(rows, inputs)
    codes[codes & 0x7F == 0x7F] = 0
    return PackedMatrix(codes=codes, group_scale=None, row_scale=size / 64)


if __name__ == "__main__":
    main()
