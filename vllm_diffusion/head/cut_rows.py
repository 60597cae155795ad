"""Rows that ``min_p``, ``top_k`` or ``top_p`` truncates, read a tile at a time; see ``cut``.

On a GPU the host reads back all it must know of them in one copy.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.transfer import on_device
from vllm_diffusion.head import cut, kinds, logit_tiles, reading
from vllm_diffusion.head.logit_tiles import tile_bytes
from vllm_diffusion.head.reference import row_statistics
from vllm_diffusion.head.sample import sample_listed
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.vocabulary import Vocabulary

# Beside the tiles of a row, its best ids while it is read.
_LIST_BYTES: Final = 128 * cut.LISTED


def listed_statistics(
    vocabulary: Vocabulary, rows: Rows, ids: Tensor, logits: Tensor
) -> CanvasStats:
    """Statistics of rows that have no ids but ``ids`` [N] or [R, N], ascending."""
    stats = row_statistics(
        logits,
        rows,
        draw=lambda weight: sample_listed(weight, ids, vocabulary.size, rows.noise),
        soft_embedding=lambda weight: vocabulary.mean_of(weight, ids),
    )
    return stats.look_up(ids)


class CutRows:
    """Reads truncated rows.

    Args:
        vocabulary: of this rank.
        budget: bytes that the tiles of a step may take.
    """

    def __init__(self, vocabulary: Vocabulary, budget: int) -> None:
        self._vocabulary, self._budget = vocabulary, budget

    def _at_once(self, bytes_a_row: int) -> int:
        return max(1, self._budget // bytes_a_row)

    def statistics(self, rows: Rows) -> CanvasStats:
        """Statistics of rows that keep the ids above a limit."""
        if rows.hidden.device.type != "cpu":
            return self._statistics_on_device(rows)
        wide, places, parts = [], [], []
        start = 0
        for part in rows.chunks(self._at_once(tile_bytes() + _LIST_BYTES)):
            index = torch.arange(start, start + len(part), device=part.hidden.device)
            start += len(part)
            found = self._survivors(part)
            done = found.complete.nonzero()[:, 0]
            rest = (~found.complete).nonzero()[:, 0]
            if len(done):
                places.append(index[done])
                parts.append(self._from_list(part.take(done), found, done))
            if len(rest):
                wide.append((index[rest], found.values[rest, 0]))
        if wide:
            index = torch.cat([rest for rest, _ in wide])
            places.append(index)
            parts.append(
                self._above_limits(rows.take(index), torch.cat([best for _, best in wide]))
            )
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(rows))

    def _statistics_on_device(self, rows: Rows) -> CanvasStats:
        """The same, waiting for the device once."""
        assert rows.rewrite is not None
        asked = rows.rewrite.truncation
        assert asked is not None
        at_once = self._at_once(tile_bytes() + _LIST_BYTES)
        found = cut.Survivors.concatenate([self._survivors(part) for part in rows.chunks(at_once)])
        some = torch.stack([(asked.top_k < self._vocabulary.size).any(), (asked.top_p < 1).any()])
        *complete, of_top_k, of_top_p = torch.cat([found.complete, some]).tolist()
        done = on_device([row for row, all_of in enumerate(complete) if all_of], rows.hidden.device)
        rest = on_device([row for row, all_of in enumerate(complete) if not all_of], done.device)
        places, parts = [], []
        if len(done):
            places.append(done)
            parts.append(self._from_list(rows.take(done), found, done))
        if len(rest):
            places.append(rest)
            borders = of_top_k, of_top_p
            parts.append(self._above_limits(rows.take(rest), found.values[rest, 0], borders))
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(rows))

    def _above_limits(
        self, rows: Rows, best: Tensor, borders: tuple[bool, bool] | None = None
    ) -> CanvasStats:
        """Rows that keep more ids than are listed; ``best`` [R] fp32 is their largest logit."""
        parts, start = [], 0
        # Limits and statistics come from the same chunk of rows: a product over other rows rounds
        # differently, and an id exactly at its row's limit would be lost.
        for part in rows.chunks(self._at_once(2 * tile_bytes() + cut.TABLE_BYTES)):
            limit = self._limits(part, best[start : start + len(part)], borders)
            tiles = logit_tiles.tiles_of(self._vocabulary, part, limit)
            parts.append(reading.read(self._vocabulary, part, tiles)[0])
            start += len(part)
        return CanvasStats.concatenate(parts)

    def _survivors(self, rows: Rows) -> cut.Survivors:
        assert rows.rewrite is not None
        assert rows.rewrite.truncation is not None
        asked = rows.rewrite.truncation.take(rows.rewrite.canvas)
        tiles = logit_tiles.tiles(self._vocabulary, rows.hidden, rows.rewrite)
        return cut.survivors(tiles, rows.temperature, asked, self._vocabulary)

    def _from_list(self, rows: Rows, found: cut.Survivors, index: Tensor) -> CanvasStats:
        """Rows whose surviving ids are all listed."""
        assert rows.rewrite is not None
        values = found.values[index]
        out = values / rows.temperature[:, None] < found.limit[index, None]
        # Best first: columns that no row keeps are dropped.
        most = len(out[0])
        if out.device.type == "cpu":
            most -= int(out.sum(dim=1).amin())
        ids, order = found.ids[index, :most].sort(dim=1)
        logits = values.masked_fill(out, -torch.inf)[:, :most].gather(1, order)
        rest = replace(rows, rewrite=replace(rows.rewrite, truncation=None))
        return listed_statistics(self._vocabulary, rest, ids, logits)

    def _limits(self, rows: Rows, best: Tensor, borders: tuple[bool, bool] | None = None) -> Tensor:
        """[R] fp32, limits of rows that keep more ids than are listed, see ``_above_limits``."""
        assert rows.rewrite is not None
        assert rows.rewrite.truncation is not None
        return cut.limits(
            partial(logit_tiles.tiles, self._vocabulary, rows.hidden, rows.rewrite),
            best,
            rows.temperature,
            rows.rewrite.truncation.take(rows.rewrite.canvas),
            self._vocabulary,
            borders=borders,
        )

    def limits_of(self, rows: Rows) -> Tensor:
        """[R] fp32, the least tempered logit that survives, -inf where nothing is truncated."""
        assert rows.rewrite is not None
        limit = torch.full_like(rows.temperature, -torch.inf)
        if rows.rewrite.truncation is None:
            return limit
        asked = kinds.cuts(rows.rewrite.truncation, self._vocabulary.size)
        cuts = asked[rows.rewrite.canvas]
        if not bool(cuts.any()):
            return limit
        found = self._survivors(rows)
        limit = torch.where(cuts, found.limit, limit)
        wide = cuts & ~found.complete
        if not bool(wide.any()):
            return limit
        return torch.where(wide, self._limits(rows, found.values[:, 0]), limit)
