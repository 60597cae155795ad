"""The largest logits of every row over the tiles of the vocabulary seen so far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.vocabulary import Vocabulary

_BIN: Final = 64  # ids that are skipped together by their maximum


class Best:
    """Keeps ``count`` logits a row and their ids; of equal logits at the border, some."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: Tensor | None = None
        self._ids: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor, ids: Tensor) -> Best:
        """From the best of this rank, [R, count] each, best first, found in another way."""
        best = cls(values.shape[1])
        best._values, best._ids = values, ids
        return best

    def add(self, logits: Tensor, first: int) -> None:
        """Add [R, n] logits of the ids from ``first`` on."""
        count, places = self._count, None
        # After the first tiles few logits are better than the last one kept. A CPU can look how
        # many; asking a device would wait for it.
        if self._values is not None and self._is_full(self._values) and logits.device.type == "cpu":
            least = self._values[:, -1:]
            logits, places = _promising(logits, least)
            count = min(count, int((logits > least).sum(dim=1).amax()))
            if not count:
                return
        best = logits.topk(min(count, logits.shape[1]), dim=1)
        ids = (best.indices if places is None else places.gather(1, best.indices)) + first
        if self._values is None or self._ids is None:
            self._values, self._ids = best.values, ids
        else:
            self._keep(
                torch.cat([self._values, best.values], dim=1), torch.cat([self._ids, ids], dim=1)
            )

    def over_ranks(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """[R, count] fp32 values and int64 ids over all ranks, best first."""
        assert self._values is not None
        assert self._ids is not None
        # fp32 holds an id exactly below 2**24.
        both = vocabulary.gather(torch.stack([self._values.float(), self._ids.float()]))
        self._keep(both[:, 0].movedim(0, 1).flatten(1), both[:, 1].movedim(0, 1).flatten(1).long())
        return self._values, self._ids

    def _is_full(self, values: Tensor) -> bool:
        return values.shape[1] == self._count > 0

    def _keep(self, values: Tensor, ids: Tensor) -> None:
        best = values.topk(min(self._count, values.shape[1]), dim=1)
        self._values, self._ids = best.values, ids.gather(1, best.indices)


def _promising(logits: Tensor, least: Tensor) -> tuple[Tensor, Tensor | None]:
    """Parts of a tile [R, n] that may hold a logit above ``least`` [R, 1], and their columns."""
    width = logits.shape[1]
    if width % _BIN:
        return logits, None
    bins = logits.view(len(logits), -1, _BIN)
    tops = bins.amax(dim=-1)
    many = int((tops > least).sum(dim=1).amax())
    if 2 * many * _BIN > width:
        return logits, None
    chosen = tops.topk(many, dim=1).indices[:, :, None]
    places = chosen * _BIN + torch.arange(_BIN, device=logits.device)
    return bins.gather(1, chosen.expand(-1, -1, _BIN)).flatten(1), places.flatten(1)
