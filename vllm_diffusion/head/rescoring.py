"""Exact logits for the best ids of a row, while its approximate ones are read a tile at a time.

An id is exact if, when its tile came, it was among the row's best so far. Which these are follows
from the row's own numbers, so a row gives the same in any batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.head import native, native_rescoring

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.vocabulary import Vocabulary

_PAIRS: Final = 1024  # rows and ids whose states and embeddings are in fp32 at a time


class Rescoring:
    """Sees every tile of R rows once, in order.

    Args:
        vocabulary: of this rank.
        hidden: [R, H] of the rows.
        count: ids of a row that are the best, at most ``native_rescoring.MOST``.
    """

    def __init__(self, vocabulary: Vocabulary, hidden: Tensor, count: int) -> None:
        self._vocabulary, self._hidden = vocabulary, hidden
        self._best = hidden.new_full((len(hidden), count), -torch.inf, dtype=torch.float32)

    def rescore(self, logits: Tensor, ranked: Tensor, first: int, *, cap: bool) -> None:
        """Put the exact logits in.

        Args:
            logits: [R, n] fp32 of the ids from ``first`` on; changed.
            ranked: [R, n] fp32, by which the best are the best; may be ``logits``.
            first: id of the tile's first column.
            cap: whether logits are softcapped.
        """
        begin = first - self._vocabulary.first
        output = self._vocabulary.output[begin : begin + logits.shape[1]]
        softcap = self._vocabulary.softcap if cap else None
        if native.fits(logits) and output.dtype in native.CPU_DTYPES:
            native_rescoring.rescore(
                logits, ranked, self._best, self._hidden, output, softcap=softcap
            )
            return
        rows, columns = _entrants(ranked, self._best)
        for start in range(0, len(rows), _PAIRS):
            some, those = rows[start : start + _PAIRS], columns[start : start + _PAIRS]
            states, matrix = self._hidden[some].float(), output[those].float()
            exact = torch.linalg.vecdot(states, matrix)
            logits[some, those] = self._vocabulary.capped(exact) if cap else exact


def _entrants(ranked: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns [P] int64 of what is among the best of a row so far.

    Of the tile's numbers above the least of the row's best, so many as there are best ones; all of
    equal ones at the end, so that nothing else decides which.

    Args:
        ranked: [R, n] fp32.
        best: [R, count] fp32, of the tiles before; changed.
    """
    count = best.shape[1]
    enters = ranked > best.amin(dim=1, keepdim=True)
    most = int(enters.sum(dim=1).amax())
    tops = torch.where(enters, ranked, -torch.inf).topk(min(most, count), dim=1).values
    if most > count:
        enters &= ranked >= tops[:, -1:]
    best.copy_(torch.cat([best, tops], dim=1).topk(count, dim=1).values)
    rows, columns = enters.nonzero(as_tuple=True)
    return rows, columns
