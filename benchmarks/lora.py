"""Cost of adapters on a CPU beside the same adapter merged into the weights, in one run.

    python benchmarks/lora.py [--quick] [--json FILE] [--rows N ...] [--rank N]

    linear     [R, 2816] x [4224, 2816]: gate and up of the released model's dense MLP, two slices
    experts    32 of the released model's experts (2816, 704), 8 a row
    step       a denoising step of an engine on a checkpoint of a quarter of the released width and
               a fifth of its depth; R is two canvases
               "step" serves adapters for attention and MLP, "step, experts" for experts as well

    merged     without LoRA, or with the adapter in the weights: what vLLM runs for plain weights
    none       LoRA is on, no row has an adapter
    one        every row has the same adapter, as text or as canvas rows
    two        half of the rows another one
    four       two adapters, of each text and canvas rows
    vllm       the product of vLLM's own wrapper for CPUs in place of ours, where it has one

Everything in bfloat16. Seconds are those of the processor over all threads; the ways take turns,
and the fastest of nine runs counts, of an engine the fastest of three.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import _report
import torch
from _cell import measure
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from vllm_diffusion.engine.lora.experts import AdaptedExperts
from vllm_diffusion.engine.lora.rows import AdapterRows
from vllm_diffusion.models.diffusion_gemma.testing.adapters import merge_adapter, write_adapter
from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, make_tiny_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HIDDEN, DENSE, INNER = 2816, 2112, 704
EXPERTS, CHOSEN = 32, 8
RUNS, ENGINE_RUNS = 9, 3
ISA = "vec"  # vLLM's portable fused experts; "amx" where the processor has it
SLOTS = 4
BATCHES = {"none": (), "one": (0,), "two": (0, 1), "four": (0, 1, 2, 3)}
"""The slots among which a batch's rows are shared out, a block of rows each."""

Ways = dict[str, "Callable[[], object]"]

STEPS, CANVASES = 8, 2
SPEC = TinySpec(
    canvas=256,
    hidden=HIDDEN // 4,
    layers=6,
    vocab=4096,
    heads=4,
    head_dim=64,
    full_head_dim=128,
    intermediate=DENSE // 4,
    experts=EXPERTS,
    experts_per_token=CHOSEN,
    expert_intermediate=INNER // 4,
    sliding_window=256,
    dtype="bfloat16",
    max_steps=STEPS,
)
LINEAR = ("self_attn.", "mlp.")
TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def main() -> None:
    """Run every cell and print it."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--rows", type=int, nargs="+", default=[64, 256, 512])
    arguments.add_argument("--rank", type=int, default=16)
    arguments.add_argument("--engine", nargs=2, metavar=("KIND", "FOLDER"), help="one, for itself")
    options = arguments.parse_args()
    if options.engine:
        run_engine(options.engine[0], Path(options.engine[1]))
        return
    if options.quick:
        options.rows = [64]
    torch.manual_seed(0)
    table: list[dict[str, Any]] = []
    for product, make in (("linear", linear_ways), ("experts", expert_ways)):
        for rows in options.rows:
            times = fastest(make(rows, options.rank))
            table += [
                {
                    "product": product,
                    "R": rows,
                    "adapters": name,
                    "cpu ms": 1e3 * taken,
                    "of merged": taken / times["merged"],
                }
                for name, taken in times.items()
            ]
    if not options.quick:
        table += step_rows(options.rank)
    _report.print_table(table)
    flat = {
        f"{row['product']}.{row['R']}.{row['adapters']}.{key}": row[key]
        for row in table
        for key in ("cpu ms", "of merged")
    }
    _report.finish(flat, headline(table), options.json)


def headline(table: list[dict[str, Any]]) -> str:
    """One adapter at the first number of rows."""
    rows = [row for row in table if row["R"] == table[0]["R"] and row["adapters"] == "one"]
    return "; ".join(
        f"{row['product']} of {row['R']} rows with one adapter: {row['of merged']:.2f} of the time "
        "of merged weights"
        for row in rows
    )


def fastest(ways: Mapping[str, Callable[[], object]], runs: int = RUNS) -> dict[str, float]:
    """Processor seconds of each way, the ways taking turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(runs):
        for name, run in ways.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - begin)
    return best


def slots_of(rows: int, slots: tuple[int, ...]) -> Tensor:
    """[R] int32, -1 where a row has no adapter."""
    if not slots:
        return torch.full((rows,), -1, dtype=torch.int32)
    return torch.tensor(slots, dtype=torch.int32).repeat_interleave(-(-rows // len(slots)))[:rows]


def assigned(slots: Tensor) -> AdapterRows:
    """The rows of a batch as our layers are given them."""
    rows = AdapterRows()
    rows.assign(slots)
    return rows


def by_vllm(slots: Tensor) -> PunicaWrapperCPU:
    """The same as vLLM's layers are given them."""
    wrapper = PunicaWrapperCPU(len(slots), len(slots), torch.device("cpu"))
    numbers = tuple((slots + 1).tolist())
    mapping = LoRAMapping(numbers, numbers, is_prefill=True)
    wrapper.update_metadata(mapping, list(range(1, SLOTS + 1)), SLOTS, HIDDEN)
    return wrapper


def linear_ways(rows: int, rank: int) -> Ways:
    """Of each way a run."""
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(draw(2 * DENSE, HIDDEN), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    a = tuple(draw(SLOTS, 1, rank, HIDDEN) for _ in range(2))
    b = tuple(draw(SLOTS, 1, DENSE, rank) for _ in range(2))

    def plain() -> Tensor:
        result: Tensor = layer.cpu_linear(x, layer.weight, None)
        return result

    def adapted(wrapper: AdapterRows | PunicaWrapperCPU) -> Callable[[], object]:
        return lambda: wrapper.add_lora_linear(plain(), x, a, b, 1.0, (DENSE, DENSE))

    ways: Ways = {"merged": plain}
    for name, slots in BATCHES.items():
        ways[name] = adapted(assigned(slots_of(rows, slots)))
        if slots:  # vLLM's gives rows without an adapter those of the last slot
            ways[f"{name}, vllm"] = adapted(by_vllm(slots_of(rows, slots)))
    return ways


def expert_ways(rows: int, rank: int) -> Ways:
    """Of each way a run."""
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    ids = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(rows)]).int()
    weights = torch.rand(rows, CHOSEN)
    w1, w2 = draw(EXPERTS, 2 * INNER, HIDDEN), draw(EXPERTS, HIDDEN, INNER)
    packed = [ops.cpu_prepack_moe_weight(each, ISA) for each in (w1, w2)]
    output = torch.empty_like(x)
    factors = {
        "w13_lora_a_stacked": (draw(SLOTS, EXPERTS, rank, HIDDEN),),
        "w13_lora_b_stacked": (draw(SLOTS, EXPERTS, 2 * INNER, rank),),
        "w2_lora_a_stacked": (draw(SLOTS, EXPERTS, rank, INNER),),
        "w2_lora_b_stacked": (draw(SLOTS, EXPERTS, HIDDEN, rank),),
    }

    def fused() -> None:
        ops.cpu_fused_moe(
            output, x, *packed, None, None, weights, ids, "gelu_tanh", ISA, skip_weighted=False
        )

    def adapted(slots: tuple[int, ...]) -> Callable[[], object]:
        kernel = AdaptedExperts.__new__(AdaptedExperts)  # what it computes needs no config
        wrapper = assigned(slots_of(rows, slots))
        kernel.set_lora_context(SimpleNamespace(punica_wrapper=wrapper, **factors))
        return lambda: kernel.apply(output, x, w1, w2, weights, ids, MoEActivation.GELU_TANH)

    return {"merged": fused} | {name: adapted(slots) for name, slots in BATCHES.items()}


def step_rows(rank: int) -> list[dict[str, Any]]:
    """The part of the table that engines of their own give."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = make_tiny_checkpoint(folder / "plain", SPEC)
        file = plain / "generation_config.json"
        # No canvas ends before its last step, so that all do the same work.
        never = {**json.loads(file.read_text()), "confidence_threshold": 1e-12}
        file.write_text(json.dumps(never))
        for number in (1, 2):
            # Small, so that adapted states stay in the range of plain ones.
            size = {"seed": number, "rank": rank, "alpha": rank, "size": 0.05}
            write_adapter(folder / f"linear{number}", plain, alike=False, only=LINEAR, **size)
            write_adapter(folder / f"experts{number}", plain, alike=False, **size)
        write_adapter(folder / "alike", plain, rank=rank, alpha=rank, size=0.05)
        merge_adapter(plain, folder / "alike", folder / "merged")
        environment = {
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        times = {
            kind: measure(
                __file__, "--engine", kind, name, environment=environment, name=f"engine {kind}"
            )
            for kind in ("merged", "linear", "experts")
        }
    merged = times.pop("merged")["none"]
    return [
        {
            "product": "step" if kind == "linear" else "step, experts",
            "R": CANVASES * SPEC.canvas,
            "adapters": batch,
            "cpu ms": 1e3 * taken,
            "of merged": taken / merged,
        }
        for kind, batches in times.items()
        for batch, taken in {"merged": merged, **batches}.items()
    ]


def run_engine(kind: str, folder: Path) -> None:
    """Print seconds a step of every batch as one line of JSON, for `step_rows`."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16}
    if kind == "linear":
        lora["lora_target_modules"] = TARGETS
    llm = LLM(
        str(folder / ("merged" if kind == "merged" else "plain")),
        dtype="bfloat16",
        max_model_len=1024,
        enforce_eager=True,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0},
        **({} if kind == "merged" else lora),
    )
    asked = [
        LoRARequest(f"{kind}{number}", number, str(folder / f"{kind}{number}")) for number in (1, 2)
    ]
    one, other = asked
    batches: dict[str, list[LoRARequest | None]] = {"none": [None] * CANVASES}
    if kind != "merged":
        batches |= {"one": [one] * CANVASES, "two": [one, other]}
    prompts: Any = [{"prompt_token_ids": [number + 9] * 8} for number in range(CANVASES)]
    sampling = SamplingParams(max_tokens=SPEC.canvas, ignore_eos=True, seed=1)
    runs: Ways = {
        name: lambda adapters=adapters: llm.generate(
            prompts, sampling, lora_request=adapters, use_tqdm=False
        )
        for name, adapters in batches.items()
    }
    for run in runs.values():
        run()
    taken = {name: seconds / STEPS for name, seconds in fastest(runs, ENGINE_RUNS).items()}
    sys.stdout.write(json.dumps(taken) + "\n")


def draw(*shape: int) -> Tensor:
    """Weights of a size that keeps activations near one."""
    return (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()


if __name__ == "__main__":
    main()
