"""The head of one denoising step, ours and native vLLM's: time, peak memory and error.

    python benchmarks/head.py [--quick] [--json FILE] [--vocab N] [--hidden N ...] [--rows N ...]
    python benchmarks/head.py --roofline [--json FILE]

    gemms      the two products of the step alone, tile by tile: no head can be faster
    ours       the streaming head, its row pass in C++
    ours-torch the streaming head where the C++ part is not built
    reference  our materialising head: plain torch, rows in chunks that fit 256 MB
    native     vLLM's softcap, its sample_row_stats_reference and its probs @ embedding, uncompiled

    --heads takes these too:

    soft-16    ours, the soft embedding that of the 16 most likely ids: soft_embedding_top_k
    last-step  ours, no soft embedding: what a canvas takes in the last step that it may take
    top_k      ours, every row cut to its 50 best ids
    top_p      ours, every row cut at 0.95; these rows are so flat that none keeps less than 512 ids
    reference-top_k, reference-top_p
    int8, fp8, nvfp4, and any of them with -soft-16
               ours, tiles read from a copy of the matrix in that form: head_weights

Every cell runs in a process of its own. Seconds are those of the processor over all threads, best
of three runs, and beside them the wall clock's, which other processes disturb. Extra memory is what
the process held at its highest during a run, less what it held before. Error is the worst of eight
rows against fp64: of the entropy in nats, of the soft embedding relative to its norm; in bf16,
against fp64 from the logits on, which all of them round alike.

--roofline measures nothing: it lists what a step of the released head launches on a GPU, and a
lower bound of its time, beside the two products alone; see ``_roofline``.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import _report
from _cell import measure
from _resident import resident

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HEADS = ("gemms", "ours", "ours-torch", "reference", "native")
SOFT = {"soft-16": 16, "last-step": -1}
COPIES_OF_OUTPUT = ("int8", "fp8", "nvfp4")
COPIED = (*COPIES_OF_OUTPUT, *(f"{form}-soft-16" for form in COPIES_OF_OUTPUT))
OTHER = (*SOFT, "top_k", "top_p", "reference-top_k", "reference-top_p", *COPIED)
SOFTCAP, TEMPERATURE, CANVAS = 30.0, 0.6, 256
TILE = 4096
CHECKED = 8  # rows whose error is measured
BUDGET = 256 * 2**20


def main() -> None:
    """Run every cell and print it."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--vocab", type=int, default=262144)
    arguments.add_argument("--hidden", type=int, nargs="+", default=[512, 2816])
    arguments.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments.add_argument("--heads", nargs="+", choices=HEADS + OTHER, default=list(HEADS))
    arguments.add_argument("--cell", help="internal: run one here")
    arguments.add_argument(
        "--roofline", action="store_true", help="estimate for GPUs; needs no GPU"
    )
    options = arguments.parse_args()
    if options.roofline:
        import _roofline

        _report.print_table(table := _roofline.table())
        _report.finish(_roofline.flat(table), _roofline.headline(table), options.json)
        return
    if options.cell:
        head, dtype, rows, vocab, hidden = options.cell.split(",")
        print(json.dumps(run_cell(head, dtype, int(rows), int(vocab), int(hidden))))
        return
    if options.quick:
        options.vocab, options.hidden, options.rows = 32768, [512], [64, 256]
    table, flat = [], {}
    for hidden in options.hidden:
        for dtype in options.dtypes:
            for rows in options.rows:
                cells = {
                    head: measure(
                        __file__,
                        "--cell",
                        f"{head},{dtype},{rows},{options.vocab},{hidden}",
                        environment={},
                        name=head,
                    )
                    for head in options.heads
                }
                for head, cell in cells.items():
                    table.append({"H": hidden, "dtype": dtype, "R": rows, "head": head, **cell})
                    name = f"{hidden}.{dtype}.{rows}.{head}"
                    flat.update({f"{name}.{key}": value for key, value in cell.items()})
    _report.print_table(table)
    _report.finish(flat, headline(table), options.json)


def headline(table: list[dict[str, _report.Value]]) -> str:
    """Ours beside native and beside the products, over all cells."""

    def ratios(head: str, key: str) -> str:
        found = [
            other[key] / ours[key]
            for ours in table
            if ours["head"] == "ours"
            for other in table
            if other["head"] == head and all(other[k] == ours[k] for k in ("H", "dtype", "R"))
        ]
        return f"{min(found):.2f} to {max(found):.2f}" if found else "-"

    def most(head: str) -> str:
        return f"{max((row['extra MB'] for row in table if row['head'] == head), default=0):.0f} MB"

    return (
        f"native takes {ratios('native', 'cpu s')} times the seconds of ours, the two products "
        f"{ratios('gemms', 'cpu s')}; native holds up to {most('native')}, ours {most('ours')}"
    )


def run_cell(head: str, dtype: str, rows: int, vocab: int, hidden: int) -> dict[str, _report.Value]:
    """Time, memory and error of one head here."""
    import torch

    torch.manual_seed(0)
    block = torch.randn(TILE, hidden) * 0.05
    # A tile of random rows, bent a little differently in every tile: random numbers for all of them
    # would take longer than the head. Bent in no order: the best ids of a row come from anywhere.
    tiles = vocab // TILE
    bent = [1 + 0.001 * (tile * 37 % tiles) for tile in range(tiles)]
    embedding = torch.cat([block * bend for bend in bent])
    embedding = embedding.to(getattr(torch, dtype))
    states = (torch.randn(rows, hidden) * (512 / hidden) ** 0.5).to(embedding.dtype)
    call = make_head(head, embedding)
    call(states[:2])  # what the libraries set up at their first call
    before = resident("VmRSS", forget_peak=True)
    times = []
    for _ in range(3):
        wall, processor = time.perf_counter(), time.process_time()
        entropy, soft = call(states)
        times.append((time.process_time() - processor, time.perf_counter() - wall))
    peak = resident("VmHWM")
    cell: dict[str, _report.Value] = {
        "cpu s": min(times)[0],
        "wall s": min(wall for _, wall in times),
        "extra MB": (peak - before) / 1024,
        "entropy error": None,
        "soft error": None,
    }
    if head in HEADS[1:]:
        truth, right = exactly(states[:CHECKED], embedding)
        cell["entropy error"] = float((entropy[:CHECKED].double() - truth).abs().max())
        off = (soft[:CHECKED].double() - right).norm(dim=1) / right.norm(dim=1)
        cell["soft error"] = float(off.max())
    return cell


def make_head(head: str, embedding: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """[R, H] states -> entropy [R] and soft embedding [R, H]."""
    import torch

    from vllm_diffusion.constrain.rewrite import Rewrite, Truncation
    from vllm_diffusion.head import native as library
    from vllm_diffusion.head.output_copy import QuantisedOutput
    from vllm_diffusion.head.reference import COPIES, ReferenceHead
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.stream import StreamingHead
    from vllm_diffusion.head.vocabulary import Vocabulary
    from vllm_diffusion.records import Noise

    def logits(states: Tensor) -> Tensor:
        return (states @ embedding.T).float().div_(SOFTCAP).tanh_().mul_(SOFTCAP)

    def gemms(states: Tensor) -> tuple[Tensor, Tensor]:
        soft = torch.zeros(states.shape)
        for first in range(0, len(embedding), TILE):
            tile = embedding[first : first + TILE]
            soft.add_((states @ tile.T) @ tile)
        return soft[:, 0], soft

    def native(states: Tensor) -> tuple[Tensor, Tensor]:
        from vllm.model_executor.models.diffusion_gemma_sampler import sample_row_stats_reference

        capped = torch.tanh((states @ embedding.T).float() / SOFTCAP) * SOFTCAP
        canvases = -(-len(states) // CANVAS)
        temperatures = torch.full((canvases,), TEMPERATURE)
        _, _, entropy, prob = sample_row_stats_reference(
            capped, temperatures, len(states) // canvases, embedding.dtype
        )
        return entropy, prob @ embedding * scale

    vocab, scale = len(embedding), scale_of(embedding)
    form, _, soft = head.partition("-") if head in COPIED else ("", "", head)
    top_k, top_p = 50 if "top_k" in head else vocab, 0.95 if "top_p" in head else 1.0
    cut = Truncation(
        min_p=torch.zeros(1),
        top_k=torch.tensor([top_k]),
        top_p=torch.tensor([top_p]),
        sorts=True,
    )
    whole = ReferenceHead(
        logits=logits,
        soft_embedding=lambda prob: prob.to(embedding.dtype) @ embedding * scale,
        max_rows=max(1, BUDGET // (COPIES * 4 * vocab)),
    )
    vocabulary = Vocabulary(
        output=embedding,
        embedding=embedding,
        size=vocab,
        softcap=SOFTCAP,
        scale=scale,
        copy=QuantisedOutput(embedding, form) if form in COPIES_OF_OUTPUT else None,
    )
    streaming = StreamingHead(vocabulary=vocabulary, whole=whole, budget=BUDGET)
    if head == "ours" and library.library() is None:
        sys.exit("the C++ part of the head is not built: run scripts/setup")
    if head == "ours-torch":
        library.library = lambda: None

    def ours(states: Tensor) -> tuple[Tensor, Tensor]:
        rows = len(states)
        noise = Noise(
            seed=torch.ones(rows, 2, dtype=torch.int64),
            position=torch.arange(rows),
            step=torch.zeros(rows, dtype=torch.int64),
        )
        rewrite = Rewrite(canvas=torch.zeros(rows, dtype=torch.int64), truncation=cut)
        stats = (whole if head.startswith("reference") else streaming)(
            Rows(
                hidden=states,
                temperature=torch.full((rows,), TEMPERATURE),
                noise=noise,
                rewrite=rewrite if top_k < vocab or top_p < 1 else None,
                soft_top_k=torch.full((rows,), SOFT[soft]) if soft in SOFT else None,
            )
        )
        return stats.entropy, stats.soft_embedding

    return {"gemms": gemms, "native": native}.get(head, ours)


def exactly(states: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy and soft embedding in fp64, the vocabulary in parts."""
    import torch

    parts = embedding.split(TILE)
    if embedding.dtype == torch.float32:
        logits = torch.cat([states.double() @ part.double().T for part in parts], dim=1)
    else:
        logits = (states @ embedding.T).double()
    prob = (SOFTCAP * torch.tanh(logits / SOFTCAP) / TEMPERATURE).softmax(dim=1)
    soft = sum(p @ part.double() for p, part in zip(prob.split(TILE, dim=1), parts, strict=True))
    return -torch.xlogy(prob, prob).sum(dim=1), soft * scale_of(embedding).double()


def scale_of(embedding: Tensor) -> Tensor:
    """What an embedding is multiplied with in the model, in its precision."""
    return embedding.new_tensor(embedding.shape[1] ** 0.5)


if __name__ == "__main__":
    main()
