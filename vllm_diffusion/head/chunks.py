"""One reading of rows over the vocabulary on a GPU: chunks of many tiles, three launches each.

    product    logits of a chunk, [R, n] in the model's dtype
    absorb     ``absorb_chunk``: a program a row. Once over the row for its largest logit, once for
               weights against the largest so far, which take the place of the logits; tile by tile
               the draw of ``sample``, whose tiles these are. Where the largest has risen, what was
               summed of the soft embedding shrinks.
    product    onto the soft embedding, summed in fp32

and ``finish_row`` once. Where the vocabulary has a copy in fp8, the first product is that of
``fp8_product``.

The meaning is that of ``reading.read``, whose tiles are one product each: 64 of them at the
released vocabulary, five launches a tile. Imported on a GPU alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
import triton

from vllm_diffusion.head import sample
from vllm_diffusion.head.best import Best
from vllm_diffusion.head.chunk_kernels import absorb_chunk, finish_row
from vllm_diffusion.head.fp8_product import Fp8Product
from vllm_diffusion.head.soft import MOST, mean_of_best, select
from vllm_diffusion.head.tile import RunningStats
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.vocabulary import Vocabulary

_NEAR_CACHE: Final = 32 * 2**20
"""Bytes of a chunk that stay in the level-2 cache of a large GPU from product to product."""

_MOST_CHUNKS: Final = 8
"""With more chunks, launches cost more than reading a chunk beyond the cache from memory."""

_TILES_OF_COPY: Final = 16
"""Tiles of a chunk that is read from a copy. They decide which ids of a row are exact, so they must
not depend on the other rows. Fewer and larger chunks score fewer ids exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """Running statistics over the chunks; uninitialised before the first, which writes them all."""

    values: Tensor  # [5, R] fp32: top, second, mass, moment, score of ``tile.RunningStats``
    tokens: Tensor  # [2, R] int64: argmax and sample
    soft: Tensor  # [R, H] fp32, sum of weight times embedding; [R, 0] where that is not wanted


def width(vocabulary: Vocabulary, rows: int, budget: int) -> int:
    """Ids of a chunk, whole tiles: its logits [rows, width] fit the budget."""
    if vocabulary.copy is not None:
        return _TILES_OF_COPY * sample.TILE
    row = rows * vocabulary.output.element_size()
    wanted = max(_NEAR_CACHE // row, -(-len(vocabulary) // _MOST_CHUNKS))
    tiles = min(wanted, budget // row) // sample.TILE
    return max(1, tiles) * sample.TILE


def rows_at_once(vocabulary: Vocabulary, budget: int) -> int:
    """Rows for which one tile fits the budget; of a copy, one chunk."""
    ids = sample.TILE
    if vocabulary.copy is not None:
        ids = min(_TILES_OF_COPY * ids, len(vocabulary))
    return max(1, budget // (ids * vocabulary.output.element_size()))


def read(vocabulary: Vocabulary, rows: Rows, budget: int) -> CanvasStats:
    """Statistics of rows that are not rewritten.

    Args:
        vocabulary: of this rank, read from the matrix itself.
        rows: without a rewrite.
        budget: bytes that the logits of a step may take.
    """
    count, ids = len(rows), min(width(vocabulary, len(rows), budget), len(vocabulary))
    rows = replace(rows, temperature=rows.temperature.contiguous())
    top_k = rows.soft_top_k if rows.self_conditioning else None
    listed = None if top_k is None else _Listed.empty(vocabulary, rows.hidden, ids)
    exact = rows.self_conditioning and (listed is None or not rows.all_near)
    sums = _Sums(
        values=rows.temperature.new_empty(5, count),
        tokens=rows.noise.position.new_empty(2, count),
        soft=rows.temperature.new_empty(count, vocabulary.embedding.shape[1] if exact else 0),
    )
    product = _product(vocabulary, rows.hidden, ids)
    for start in range(0, len(vocabulary), ids):
        logits = product(slice(start, start + ids))
        _absorb(vocabulary, rows, logits, start, sums=sums, listed=listed, exact=exact)
        if exact:
            part = vocabulary.embedding[start : start + ids]
            _accumulate(sums.soft, logits, part, fresh=start == 0)
        del logits  # before the next are there
    finished = _over_ranks if len(vocabulary) < vocabulary.size else _finished
    stats = finished(vocabulary, rows.temperature, sums, exact=exact)
    if listed is None or top_k is None:
        return stats
    values, tokens = listed.best(vocabulary).over_ranks(vocabulary)
    near = mean_of_best(
        vocabulary,
        vocabulary.capped(values.float()),
        tokens,
        top_k,
        argmax=stats.argmax,
        temperature=rows.temperature,
    )
    if stats.soft_embedding is not None:
        near = select(top_k, stats.soft_embedding, near)
    return replace(stats, soft_embedding=near)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    """Logits that contain the best of every row; the host never looks how many they are.

    A lane is a place in a tile. The N best ids of a chunk are in the N lanes whose largest logits
    are the largest: an id in another lane has N that are no worse before it.
    """

    lanes: Tensor  # [R, chunks, N] int32
    values: Tensor  # [R, tiles, N] model dtype, logits before the cap
    tiles: int  # of a chunk

    @staticmethod
    def empty(vocabulary: Vocabulary, hidden: Tensor, ids: int) -> _Listed:
        """Before the first chunk, of ``ids`` ids."""
        count, chunks = min(MOST + 1, vocabulary.block()), -(-len(vocabulary) // ids)
        return _Listed(
            lanes=hidden.new_empty(len(hidden), chunks, count, dtype=torch.int32),
            values=hidden.new_empty(len(hidden), len(vocabulary.tiles()), count),
            tiles=-(-ids // sample.TILE),
        )

    def best(self, vocabulary: Vocabulary) -> Best:
        """The best of this rank, before the cap."""
        lanes = self.lanes.shape[2]
        count = min(MOST + 1, len(vocabulary))
        values, place = self.values.flatten(1).topk(count, dim=1)
        tile = place // lanes
        at = tile // self.tiles * lanes + place % lanes
        lane = self.lanes.flatten(1).gather(1, at)
        return Best.of(values, lane + (tile * sample.TILE + vocabulary.first))


def _product(vocabulary: Vocabulary, hidden: Tensor, ids: int) -> Callable[[slice], Tensor]:
    """Gives the logits [R, n] of some of this rank's ids, valid until it is called again.

    Args:
        vocabulary: of this rank.
        hidden: [R, H].
        ids: of a chunk, the most that are requested at once.
    """
    if vocabulary.copy is not None:
        return Fp8Product(vocabulary, vocabulary.copy, hidden, ids)
    buffer = hidden.new_empty(len(hidden) * ids)

    def product(some: slice) -> Tensor:
        output = vocabulary.output[some]
        logits = buffer[: len(hidden) * len(output)].view(len(hidden), len(output))
        return torch.mm(hidden, output.T, out=logits)

    return product


def _absorb(
    vocabulary: Vocabulary,
    rows: Rows,
    logits: Tensor,
    start: int,
    *,
    sums: _Sums,
    listed: _Listed | None,
    exact: bool,
) -> None:
    """Add a chunk of logits [R, n]; where ``exact``, weights in the same dtype take their place."""
    noise, columns, block = rows.noise, logits.shape[1], vocabulary.block()
    tile = start // sample.TILE
    lanes, values = sums.tokens, logits  # nothing is listed there
    if listed is not None:
        lanes, values = listed.lanes[:, tile // listed.tiles], listed.values[:, tile:]
    absorb_chunk[(len(rows),)](
        logits,
        columns,
        vocabulary.first + start,
        vocabulary.softcap or 0.0,
        rows.temperature,
        noise.seed.contiguous(),
        noise.position.contiguous(),
        noise.step.contiguous(),
        sums.values,
        sums.tokens,
        len(rows),
        sums.soft,
        sums.soft.shape[1],
        lanes,
        values,
        lanes.stride(0),
        values.stride(0),
        CAPPED=vocabulary.softcap is not None,
        FIRST=start == 0,
        WEIGHTS=exact,
        LANES=0 if listed is None else listed.lanes.shape[2],
        BITS=16 if logits.dtype == torch.bfloat16 else 32,
        WHOLE=columns % sample.TILE == 0 and block == sample.TILE,
        TILE=sample.TILE,
        BLOCK=block,
        num_warps=8,
    )


def _accumulate(soft: Tensor, weight: Tensor, embedding: Tensor, *, fresh: bool) -> None:
    """Add weight [R, n] @ embedding [n, H], summed in fp32, to [R, H] fp32."""
    if embedding.dtype == torch.float32 or soft.device.type == "cpu":
        soft.addmm_(weight.float(), embedding.float(), beta=0 if fresh else 1)
    elif fresh:
        torch.mm(weight, embedding, out_dtype=torch.float32, out=soft)
    else:
        torch.addmm(soft, weight, embedding, out_dtype=torch.float32, out=soft)


def _finished(
    vocabulary: Vocabulary, temperature: Tensor, sums: _Sums, *, exact: bool
) -> CanvasStats:
    """Statistics from the sums of a single rank; soft embeddings only where ``exact``."""
    rows, hidden = sums.soft.shape
    entropy, top_prob, margin = temperature.new_empty(3, rows)
    embedding = vocabulary.embedding.new_empty(rows, hidden)
    scale = vocabulary.scale
    finish_row[(rows,)](
        sums.values,
        rows,
        temperature,
        sums.soft,
        hidden,
        scale,
        entropy,
        top_prob,
        margin,
        embedding,
        SCALE_IN_MEMORY=isinstance(scale, torch.Tensor),
        BLOCK=min(1024, triton.next_power_of_2(vocabulary.embedding.shape[1])),
        num_warps=4,
    )
    return CanvasStats(
        argmax=sums.tokens[0],
        sample=sums.tokens[1],
        entropy=entropy,
        top_prob=top_prob,
        margin=margin,
        soft_embedding=embedding if exact else None,
    )


def _over_ranks(
    vocabulary: Vocabulary, temperature: Tensor, sums: _Sums, *, exact: bool
) -> CanvasStats:
    """The same over all ranks."""
    top, second, mass, moment, score = sums.values
    running = RunningStats(
        top=top,
        second=second,
        mass=mass,
        moment=moment,
        score=score,
        argmax=sums.tokens[0],
        sample=sums.tokens[1],
    )
    together, shrink = running.over_ranks(temperature, vocabulary)
    soft = None
    if exact:
        soft = vocabulary.add(sums.soft.mul_((shrink / together.mass)[:, None])) * vocabulary.scale
        soft = soft.to(vocabulary.embedding.dtype)
    return together.statistics(temperature, soft)
