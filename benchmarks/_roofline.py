"""Roofline estimate of a step's head on a GPU, from launches recorded without a GPU.

The real head runs on tensors with a device, a shape and a dtype but no data, and every matrix
product and kernel launch is recorded with its operands. A product takes the longer of its bytes and
its operations at 70 % of the GPU's peak. A kernel takes its bytes at 70 % of the memory bandwidth,
ignoring the level-2 cache. A launch takes 4 us of the host, as if the GPU waited for each. These
times are estimates; nothing is measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from torch import Tensor

CANVASES = (1, 4, 16)
CANVAS, VOCAB, HIDDEN, SOFTCAP, BUDGET = 256, 262144, 2816, 30.0, 256 * 2**20
REACHED = 0.7
LAUNCH = 4e-6
FORMS = ("bf16", "soft-64", "fp8")
"""The head itself; with the soft embedding of few ids asked for by every request; with chunks read
from a copy in fp8, whose best ids are exact."""
BAR = 1.25
"""How much longer than the products alone a step's head may take."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Peaks a second, dense, sums in fp32; from the makers' data sheets."""

    bandwidth: float
    bf16: float
    fp8: float

    def seconds(self, work: Work) -> float:
        """Of a product."""
        peak = self.fp8 if work.fp8 else self.bf16
        return max(work.bytes / self.bandwidth, work.operations / peak) / REACHED


GPUS = {
    "H100": Gpu(bandwidth=3.35e12, bf16=990e12, fp8=1980e12),
    "H200": Gpu(bandwidth=4.8e12, bf16=990e12, fp8=1980e12),
    "RTX 5090": Gpu(bandwidth=1.79e12, bf16=210e12, fp8=420e12),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch reads, writes and multiplies."""

    bytes: int
    operations: int = 0
    fp8: bool = False


@dataclass
class Launches:
    """Of one step."""

    products: list[Work] = field(default_factory=list)
    kernels: list[Work] = field(default_factory=list)

    def __len__(self) -> int:
        """All of them."""
        return len(self.products) + len(self.kernels)


def size(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def product_of(one: Tensor, other: Tensor, *more: Tensor) -> Work:
    """[m, k] @ [k, n]; ``more`` is read or written beside."""
    operations = 2 * one.shape[0] * one.shape[1] * other.shape[1]
    fp8 = one.element_size() == 1
    return Work(bytes=size(one, other, *more), operations=operations, fp8=fp8)


class Recorded(TorchDispatchMode):
    """Writes down what torch launches."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self._launches = launches

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.is_view or "empty" in name:
            return out
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if name.startswith("_scaled_mm"):
            scales = [value for value in tree_leaves(args[2:]) if isinstance(value, torch.Tensor)]
            self._launches.products.append(product_of(*tensors[:2], *scales, out))
        elif name == "mm":
            self._launches.products.append(product_of(*tensors[:2], out))
        elif name == "addmm":
            self._launches.products.append(product_of(*tensors[1:3], tensors[0], out))
        elif "embedding_bag" in name:  # of the matrix, the rows that are asked for
            row = tensors[0].shape[1] * tensors[0].element_size()
            self._launches.kernels.append(Work(bytes=tensors[1].numel() * row))
        else:
            made = [value for value in tree_leaves(out) if isinstance(value, torch.Tensor)]
            self._launches.kernels.append(Work(bytes=size(*tensors, *made)))
        return out


def kernel_work(name: str, operands: dict[str, Any]) -> Work:
    """What a Triton kernel of the head reads and writes, [R] numbers left out."""
    if name == "absorb_chunk":  # reads its logits twice, writes weights; shrinks at every chunk
        written = size(operands["logits"]) if operands["WEIGHTS"] else 0
        if operands["WEIGHTS"] and not operands["FIRST"]:
            written += 2 * size(operands["soft"])
        if operands["LANES"]:
            written += size(operands["lanes"], operands["listed"])
        return Work(bytes=2 * size(operands["logits"]) + written)
    if name == "round_row":
        return Work(bytes=size(operands["hidden"], operands["codes"]))
    if name == "rescore_row":  # reads its logits once, and the matrix for every id of every row
        ids = operands["places"].numel()
        row = operands["inputs"] * operands["output"].element_size()
        operations = 2 * ids * operands["inputs"]
        return Work(bytes=size(operands["logits"]) + ids * row, operations=operations)
    assert name == "finish_row", name
    return Work(bytes=size(operands["soft"], operands["embeddings"]) if operands["hidden"] else 0)


def launched(rows: int, form: str) -> Launches:
    """What one step launches; its form is one of ``FORMS``."""
    from triton.runtime.jit import JITFunction

    from vllm_diffusion.head.output_copy import QuantisedOutput
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.stream import StreamingHead
    from vllm_diffusion.head.vocabulary import Vocabulary
    from vllm_diffusion.records import Noise

    launches = Launches()

    def run(self: JITFunction, *args: object, **options: object) -> None:
        operands = dict(zip(self.arg_names, args, strict=False)) | options
        launches.kernels.append(kernel_work(self.fn.__name__, operands))

    matrix = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, device="meta")
    counters = torch.empty(rows, dtype=torch.int64, device="meta")
    vocabulary = Vocabulary(
        output=matrix,
        embedding=matrix,
        size=VOCAB,
        softcap=SOFTCAP,
        scale=matrix.new_empty(()),
        copy=QuantisedOutput(matrix, "fp8") if form == "fp8" else None,
    )
    # Its materialising head is never asked.
    head = StreamingHead(vocabulary=vocabulary, whole=None, budget=BUDGET)  # type: ignore[arg-type]
    noise = Noise(seed=counters.new_empty(rows, 2), position=counters, step=counters)
    temperature = torch.empty(rows, device="meta")
    kept, JITFunction.run = JITFunction.run, run
    try:
        with Recorded(launches):
            hidden = matrix.new_empty(rows, HIDDEN)
            asked = Rows(hidden=hidden, temperature=temperature, noise=noise)
            if form == "soft-64":
                asked = replace(asked, soft_top_k=counters, all_near=True)
            head(asked)
    finally:
        JITFunction.run = kept
    return launches


def alone(rows: int) -> list[Work]:
    """The two products of a step, each as one."""
    matrix = torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, device="meta")
    hidden, logits = matrix.new_empty(rows, HIDDEN), matrix.new_empty(rows, VOCAB)
    return [product_of(hidden, matrix.T, logits), product_of(logits, matrix, hidden)]


def table() -> list[dict[str, Any]]:
    """A row for every form, GPU and number of canvases."""
    found = []
    for form, canvases in product(FORMS, CANVASES):
        rows = canvases * CANVAS
        step, products = launched(rows, form), alone(rows)
        work = [*step.products, *step.kernels]
        for name, gpu in GPUS.items():
            least = sum(map(gpu.seconds, products))
            parts = {
                "products ms": sum(map(gpu.seconds, step.products)),
                "kernels ms": sum(each.bytes for each in step.kernels) / gpu.bandwidth / REACHED,
                "launches ms": LAUNCH * len(step),
            }
            whole = sum(parts.values())
            found.append(
                {
                    "form": form,
                    "GPU": name,
                    "canvases": canvases,
                    "GB": sum(each.bytes for each in work) / 1e9,
                    "TFLOP": sum(each.operations for each in work) / 1e12,
                    "launches": len(step),
                    **{part: 1e3 * seconds for part, seconds in parts.items()},
                    "head ms": 1e3 * whole,
                    "alone ms": 1e3 * least,
                    "ratio": whole / least,
                }
            )
    return found


def flat(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table under flat keys."""
    return {
        f"{row['form']}.{row['GPU']}.{row['canvases']}.{name}": value
        for row in rows
        for name, value in row.items()
        if name not in {"form", "GPU", "canvases"}
    }


def headline(rows: list[dict[str, Any]]) -> str:
    """The worst of it, and what the forms make of it."""
    plain = [row for row in rows if row["form"] == FORMS[0]]
    worst = max(plain, key=lambda row: row["ratio"])
    forms = ", ".join(
        f"{form} {min(ratios):.2f} to {max(ratios):.2f}"
        for form in FORMS[1:]
        if (ratios := [row["ratio"] for row in rows if row["form"] == form])
    )
    return (
        f"the head takes at most {worst['ratio']:.2f} times its two products alone "
        f"({worst['GPU']}, {worst['canvases']} canvases; the bar is {BAR}), and "
        f"{max(row['launches'] for row in plain)} launches; {forms}"
    )
