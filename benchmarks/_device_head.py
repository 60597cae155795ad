"""Device time of a step's head, beside that of the two matrix products it cannot avoid.

    python benchmarks/_device_head.py --rows 256 1024 --hidden 2816 --vocab 262144

The last line is JSON: the milliseconds of both for every number of rows. The products have the
shapes of the head's and nothing between them; they run whole and in large tiles, and the faster
counts.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.head.stream import StreamingHead
from vllm_diffusion.head.vocabulary import Vocabulary
from vllm_diffusion.records import Noise

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SOFTCAP, TEMPERATURE = 30.0, 0.6
BUDGET = 256 * 2**20
"""As served by default."""
LARGE_TILE = 32768
WARM, REPEATS = 5, 21


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rows", type=int, nargs="+", required=True)
    arguments.add_argument("--hidden", type=int, required=True)
    arguments.add_argument("--vocab", type=int, required=True)
    options = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    embedding = torch.randn(options.vocab, options.hidden, device=device, dtype=torch.bfloat16)
    embedding *= 0.05
    print(json.dumps({rows: times(rows, embedding) for rows in options.rows}))


def times(num_rows: int, embedding: Tensor) -> dict[str, float]:
    """Milliseconds of the products and of the head."""
    states = torch.randn(
        num_rows, embedding.shape[1], device=embedding.device, dtype=embedding.dtype
    )
    streaming, scale = head_of(embedding), embedding.shape[1] ** 0.5
    states /= scale  # logits of a few units
    counter = torch.arange(num_rows, device=embedding.device)
    noise = Noise(
        seed=counter[:, None].expand(-1, 2).contiguous(),
        position=counter,
        step=torch.zeros_like(counter),
    )
    temperature = torch.full((num_rows,), TEMPERATURE, device=embedding.device)
    rows = Rows(hidden=states, temperature=temperature, noise=noise)

    def products(tile: int) -> None:
        for part in embedding.split(tile):
            (states @ part.T) @ part

    return {
        "products_ms": min(
            milliseconds(lambda: products(len(embedding)), embedding.device),
            milliseconds(lambda: products(LARGE_TILE), embedding.device),
        ),
        "head_ms": milliseconds(lambda: streaming(rows), embedding.device),
    }


def head_of(embedding: Tensor) -> StreamingHead:
    """The head as a model with tied embeddings gives it to the engine."""

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("plain rows need no whole logits")

    vocabulary = Vocabulary(
        output=embedding,
        embedding=embedding,
        size=len(embedding),
        softcap=SOFTCAP,
        scale=embedding.new_tensor(embedding.shape[1] ** 0.5),
    )
    whole = ReferenceHead(logits=refuse, soft_embedding=refuse, max_rows=1)
    return StreamingHead(vocabulary=vocabulary, whole=whole, budget=BUDGET)


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of several runs, by CUDA events on a GPU."""
    for _ in range(WARM if device.type == "cuda" else 1):
        work()
    found = []
    for _ in range(REPEATS if device.type == "cuda" else 3):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(float(start.elapsed_time(end)))
        else:
            started = time.perf_counter()
            work()
            found.append(1000 * (time.perf_counter() - started))
    return median(found)


if __name__ == "__main__":
    main()
