"""One reading of rows over the vocabulary: tiles of logits in, statistics out.

The products are the library's. What is between them is ``tile.absorb``: in C++ on a CPU, see
``native``, in Triton on a GPU, see ``fused``, or in CUDA where that is asked for, see ``cuda``.
Where statistics by class are asked for too, ``classes`` sees every tile before it is overwritten.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.head import native, sample, tile
from vllm_diffusion.head.sample import tile_uniforms
from vllm_diffusion.head.soft import SoftEmbedding
from vllm_diffusion.head.tile import RunningStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from torch import Tensor

    from vllm_diffusion.head.classes import ClassPass
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.vocabulary import Vocabulary
    from vllm_diffusion.records import CanvasStats


def read(
    vocabulary: Vocabulary,
    rows: Rows,
    tiles: Iterator[tuple[int, int, Tensor]],
    by_class: ClassPass | None = None,
) -> tuple[CanvasStats, RunningStats]:
    """Statistics of the rows, and the sums they come from.

    Args:
        vocabulary: of this rank.
        rows: what is read.
        tiles: number, first id and logits [R, n] of their tiles, overwritten; capped where the
            rows are rewritten.
        by_class: sees them as well.
    """
    rewrite, temperature = rows.rewrite, rows.temperature
    softcap = vocabulary.softcap if rewrite is None else None
    gumbel, inside = tile_uniforms(rows.noise, -(-vocabulary.size // sample.TILE))
    running = RunningStats.initial(len(rows), temperature.device)
    soft = None
    if rows.self_conditioning:
        soft = SoftEmbedding(vocabulary, rows.soft_top_k, running.top)
    for number, first, logits in tiles:
        if rewrite is not None:
            tile.without_infinities(logits)
        if soft is not None:
            soft.see(logits, first)
        if by_class is not None:
            by_class.see(logits, first, softcap)
        weight, shrink = absorb_of(logits)(
            running,
            logits,
            first=first,
            softcap=softcap,
            temperature=temperature,
            uniforms=(gumbel[:, number], inside[:, number]),
        )
        if soft is not None:
            soft.add(weight, shrink, first)
    together, shrink = running.over_ranks(temperature, vocabulary)
    whole = None
    if soft is not None:
        whole = soft.over_ranks(together, shrink, temperature, capped=rewrite is not None)
    stats = together.statistics(temperature, whole)
    if rewrite is not None and rewrite.greedy is not None:
        kept = torch.where(rewrite.greedy[rewrite.canvas], stats.argmax, stats.sample)
        stats = replace(stats, sample=kept)
    return stats, together


def in_chunks(vocabulary: Vocabulary, rows: Rows) -> ModuleType | None:
    """``chunks`` if these rows are read many tiles at a time; None if they are read one by one.

    Meta tensors are read as on a GPU: benchmarks count the launches.
    """
    if rows.rewrite is not None or not (rows.hidden.is_cuda or rows.hidden.is_meta):
        return None
    from vllm_diffusion.head import cuda

    if vocabulary.copy is None and cuda.chosen():
        return None
    from vllm_diffusion.head import chunks

    return chunks


def absorb_of(logits: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of ``tile.absorb`` that is fastest for these logits."""
    if logits.is_cuda:
        from vllm_diffusion.head import cuda

        if cuda.chosen():
            return cuda.absorb
        from vllm_diffusion.head import fused

        return fused.absorb
    return native.absorb if native.fits(logits) else tile.absorb
