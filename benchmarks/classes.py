"""Cost of statistics by class in the head of one denoising step, at the real vocabulary.

    OMP_NUM_THREADS=1 python benchmarks/classes.py [--quick] [--json FILE] [--rows N ...]

    even       all classes have about the same size: the worst case for the cache
    skewed     sizes fall as 1 / rank, as with the tokens of a grammar: few classes hold most ids
    sparse     nine of ten ids are in class 0, which needs no statistics; the others as in skewed

Seconds are processor time over all threads, the median of ``--repeats`` runs; the head with and
without classes alternate, so that other load affects both. Extra is the added time relative to the
head's, without the first run, which sorts the ids; that is "order s", needed once per set of
classes.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import TYPE_CHECKING

import _report

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LAYOUTS = ("even", "skewed", "sparse")
SOFTCAP, TEMPERATURE, BUDGET = 30.0, 0.6, 256 * 2**20


def main() -> None:
    """Run every cell and print it."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--vocab", type=int, default=262144)
    arguments.add_argument("--hidden", type=int, default=512)
    arguments.add_argument("--rows", type=int, nargs="+", default=[64, 256])
    arguments.add_argument("--classes", type=int, nargs="+", default=[10, 100, 1000, 3000])
    arguments.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    arguments.add_argument("--dtypes", nargs="+", default=["float32"])
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument(
        "--torch", action="store_true", help="use the torch version instead of C++"
    )
    options = arguments.parse_args()
    if options.quick:
        options.rows, options.classes, options.repeats = [64], [10, 1000], 3

    import torch

    from vllm_diffusion.head import native

    if options.torch:
        native.library = lambda: None
    elif native.library() is None:
        sys.exit("the C++ part of the head is not built: run scripts/setup")
    table: list[dict[str, _report.Value]] = []
    for dtype in options.dtypes:
        block = torch.randn(4096, options.hidden) * 0.05
        copies = [block * (1 + 0.001 * tile) for tile in range(options.vocab // 4096)]
        embedding = torch.cat(copies).to(getattr(torch, dtype))
        for rows in options.rows:
            for layout in options.layouts:
                for count in options.classes:
                    cell = measured(embedding, rows, layout, count, options.repeats)
                    shape = {"dtype": dtype, "R": rows, "classes": count, "sizes": layout}
                    table.append({**shape, **cell})
    _report.print_table(table)
    flat = {
        f"{row['dtype']}.{row['R']}.{row['sizes']}.{row['classes']}.{key}": row[key]
        for row in table
        for key in ("head s", "both s", "extra %", "order s")
    }
    most = max(table, key=lambda row: row["extra %"])
    headline = (
        f"statistics by class add {min(row['extra %'] for row in table):.1f} to "
        f"{most['extra %']:.1f} % to the head, most at {most['classes']} {most['sizes']} classes"
    )
    _report.finish(flat, headline, options.json)


def measured(
    embedding: Tensor, rows: int, layout: str, count: int, repeats: int
) -> dict[str, _report.Value]:
    """Seconds of the head without and with classes."""
    import torch

    from vllm_diffusion.head.reference import ReferenceHead
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.stream import StreamingHead
    from vllm_diffusion.head.vocabulary import Vocabulary
    from vllm_diffusion.records import Noise

    vocabulary = Vocabulary(
        output=embedding, embedding=embedding, size=len(embedding), softcap=SOFTCAP
    )
    whole = ReferenceHead(logits=_refused, soft_embedding=_refused, max_rows=1)
    head = StreamingHead(vocabulary=vocabulary, whole=whole, budget=BUDGET)
    counter = torch.arange(rows)
    noise = Noise(seed=torch.ones(rows, 2, dtype=torch.int64), position=counter, step=counter * 0)
    states = (torch.randn(rows, embedding.shape[1]) * 1.0).to(embedding.dtype)
    asked = Rows(hidden=states, temperature=torch.full((rows,), TEMPERATURE), noise=noise)
    class_of = classes_of(len(embedding), layout, count)

    def both() -> None:
        head.by_class(asked, class_of=class_of, num_classes=count)

    def alone() -> None:
        head(asked)

    alone()
    first = seconds(both)
    without, together = [], []
    for _ in range(repeats):
        without.append(seconds(alone))
        together.append(seconds(both))
    plain, full = statistics.median(without), statistics.median(together)
    return {
        "head s": plain,
        "both s": full,
        "extra %": 100 * (full - plain) / plain,
        "order s": first - full,
    }


def classes_of(vocab: int, layout: str, count: int) -> Tensor:
    """[V] int32."""
    import torch

    generator = torch.Generator().manual_seed(count)
    size = torch.ones(count)
    if layout != "even":
        size = 1 / torch.arange(1, count + 1)
    class_of = 1 + torch.multinomial(size[1:], vocab, replacement=True, generator=generator)
    if layout == "sparse":
        class_of[torch.rand(vocab, generator=generator) < 0.9] = 0
    return class_of.int()


def seconds(run: Callable[[], None]) -> float:
    """Of the processor."""
    before = time.process_time()
    run()
    return time.process_time() - before


def _refused(_: Tensor) -> Tensor:
    raise AssertionError("[R, vocab]")


if __name__ == "__main__":
    main()
