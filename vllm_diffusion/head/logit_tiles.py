"""The logits of rows, a tile of the vocabulary at a time: product, softcap and rewrite."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.dense import DenseRewrite
from vllm_diffusion.constrain.logits import LENIENCE
from vllm_diffusion.constrain.window import TiledRewrite
from vllm_diffusion.head import sample
from vllm_diffusion.head.rescoring import Rescoring

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Rewrite
    from vllm_diffusion.head.output_copy import QuantisedOutput
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.vocabulary import Vocabulary

TILE_COPIES: Final = 6
"""fp32 tiles that a row needs at most: its logits, its weights and what is between them in the
torch form; the other forms need fewer. Measured by tests/unit/head/test_memory.py."""


def tile_bytes() -> int:
    """Bytes that the tiles of a row take at most."""
    return TILE_COPIES * 4 * sample.TILE


def tiles(
    vocabulary: Vocabulary,
    hidden: Tensor,
    rewrite: Rewrite | None,
    *,
    cap: bool = True,
    ranked_by: TiledRewrite | DenseRewrite | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Number, first id and logits [R, n] of this rank's tiles, each valid until the next one.

    Capped and rewritten, in fp32; or, not capped, as the product gives them.

    Args:
        vocabulary: of this rank.
        hidden: [R, H].
        rewrite: of the rows.
        cap: also where nothing is rewritten.
        ranked_by: a rewrite that only says which ids of a row are its best; see ``rescoring``.
    """
    tiled = None if rewrite is None else _tiled(vocabulary, rewrite)
    product = _product(vocabulary, hidden)
    rescoring = None
    copy = _copy(vocabulary, hidden)
    if copy is not None and copy.rescored:
        rescoring = Rescoring(vocabulary, hidden, copy.rescored)
    for number, first in enumerate(vocabulary.tiles()):
        start = first - vocabulary.first
        logits = product(slice(start, start + sample.TILE))
        if cap:
            logits = vocabulary.capped(logits.float())
        if rescoring is not None:
            by = tiled or ranked_by
            # What is rewritten is ranked as what it becomes.
            ranked = logits if by is None else by.apply(logits, number, first)
            rescoring.rescore(logits, ranked, first, cap=cap)
        if tiled is not None:
            logits = tiled.apply(logits, number, first)
        yield first // sample.TILE, first, logits


def _product(vocabulary: Vocabulary, hidden: Tensor) -> Callable[[slice], Tensor]:
    """Gives the logits [R, n] of some of this rank's ids, valid until it is called again."""
    if (copy := _copy(vocabulary, hidden)) is not None:
        return copy.product(hidden)
    width = min(sample.TILE, len(vocabulary))
    buffer = hidden.new_empty(len(hidden) * width)

    def product(rows: slice) -> Tensor:
        some = vocabulary.output[rows]
        logits = buffer[: len(hidden) * len(some)].view(len(hidden), len(some))
        return torch.mm(hidden, some.T, out=logits)

    return product


def _copy(vocabulary: Vocabulary, hidden: Tensor) -> QuantisedOutput | None:
    """The copy that tiles are read from, if any; on a GPU only ``chunks`` reads it."""
    return vocabulary.copy if hidden.device.type == "cpu" else None


def tiles_of(
    vocabulary: Vocabulary, rows: Rows, limit: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """``tiles`` of the rows, capped where they are rewritten, without what is below their limit.

    Args:
        vocabulary: of this rank.
        rows: to be read.
        limit: [R] fp32, the least tempered logit that stays; None leaves everything.
    """
    rewrite = rows.rewrite
    for number, first, logits in tiles(vocabulary, rows.hidden, rewrite, cap=rewrite is not None):
        if limit is not None:
            out = logits / rows.temperature[:, None] < limit[:, None]
            logits.masked_fill_(out, -torch.inf)
        yield number, first, logits


def lenient_tiles(
    vocabulary: Vocabulary, rows: Rows, limit: Tensor
) -> Iterator[tuple[int, int, Tensor]]:
    """The same where masks do not forbid but cost, see ``constrain.logits.lenient_logits``.

    Args:
        vocabulary: of this rank.
        rows: to be read, rewritten.
        limit: [R] fp32, see ``tiles_of``; -inf leaves everything.
    """
    assert rows.rewrite is not None
    temperature = rows.temperature[:, None]
    strict = _tiled(vocabulary, replace(rows.rewrite, pinned=None))
    free = _tiled(vocabulary, rows.rewrite.without_masks())
    # The best ids are those of the strict distribution, whose limit this is.
    theirs = tiles(vocabulary, rows.hidden, None, ranked_by=strict)
    for place, (number, first, logits) in enumerate(theirs):
        kept = strict.apply(logits, place, first)
        out = (kept == -torch.inf) | (kept / temperature < limit[:, None])
        dear = free.apply(logits, place, first) - LENIENCE * temperature
        yield number, first, torch.where(out, dear, kept)


def _tiled(vocabulary: Vocabulary, rewrite: Rewrite) -> TiledRewrite | DenseRewrite:
    if rewrite.canvas.device.type != "cpu":
        return DenseRewrite(rewrite, vocabulary.size)
    edges = [*vocabulary.tiles(), vocabulary.first + len(vocabulary)]
    return TiledRewrite(rewrite, torch.tensor(edges), vocabulary.size)
