"""The head that reads the vocabulary a tile at a time: no [R, vocab] tensor, the same results.

    pinned rows                      one id is left: nothing to compute
    rows with a short list of ids    only these columns of the embedding
    rows whose distribution is cut   the best ids of the row, if no others survive the cut;
                                     else tiles without the ids that are cut off, see ``cut``
    rows of rewritten logits         tiles: product, softcap, rewrite, ``absorb``, product
    all others                       tiles: product, ``absorb``, which caps, product

Statistics by class come from the same tiles. Rows whose rewrite forbids ids are read once more for
them, from a distribution in which forbidden ids are only unlikely.

How tiles are read: ``reading``. Which rows go which way: ``kinds``. The host must know that. On a
GPU it follows from the requests, and only rows whose distribution is cut wait for the device, once.
Where an automaton or a parser constrains canvases of the step, others wait once for their kinds.
Under tensor parallelism every rank keeps its rows of the embedding and exchanges statistics, [R] or
[R, C] each, and the [R, H] soft embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.automaton.class_stats import ClassStats
from vllm_diffusion.constrain.transfer import on_device
from vllm_diffusion.constrain.window import rewrite_listed
from vllm_diffusion.head import cut, kinds, logit_tiles, reading
from vllm_diffusion.head.best import Best
from vllm_diffusion.head.classes import CLASS_BYTES, ClassPass, pinned_class_stats
from vllm_diffusion.head.cut_rows import CutRows, listed_statistics
from vllm_diffusion.head.logit_tiles import TILE_COPIES, tile_bytes
from vllm_diffusion.head.reference import kept_token
from vllm_diffusion.head.running_classes import TokenClasses
from vllm_diffusion.head.scores import scores
from vllm_diffusion.records import CanvasStats, TokenScores

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Wish
    from vllm_diffusion.head.reference import ReferenceHead
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingHead:
    """Same results as ``whole``, which answers only where the answer itself is [R, vocab]."""

    vocabulary: Vocabulary
    whole: ReferenceHead
    budget: int
    """Bytes that the tiles of a step may take, on top of what is O(R * H)."""

    def __call__(self, rows: Rows) -> CanvasStats:
        """See ``Head``."""
        rewrite = rows.rewrite
        if rewrite is None:
            return self._streamed(rows)
        if not rewrite.changes_logits():
            return self._plain(rows)
        if rewrite.wishes is not None:
            return self._by_wishes(rows, rewrite.wishes)
        places, parts = [], []
        for kind, index in kinds.groups(kinds.by_row(rewrite, self.vocabulary.size)):
            places.append(index)
            parts.append(self._of_kind(kind, rows.take(index)))
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(rows))

    def _of_kind(self, kind: int, rows: Rows, ids: Tensor | None = None) -> CanvasStats:
        ways = {
            kinds.PLAIN: self._plain,
            kinds.REWRITTEN: self._streamed,
            kinds.CUT: self._cuts.statistics,
            kinds.PINNED: self._pinned,
        }
        return ways.get(kind, partial(self._listed, kind, ids=ids))(rows)

    def _by_wishes(self, rows: Rows, wishes: Sequence[Wish]) -> CanvasStats:
        """All rows of a step, on a device that the host does not ask for their kinds."""
        assert rows.rewrite is not None
        # Only the device knows which rows are pinned: they are read, and corrected afterwards.
        free = replace(rows, rewrite=replace(rows.rewrite, pinned=None))
        places, parts = [], []
        for kind, some in kinds.by_request(wishes, len(rows)):
            index = on_device(some, rows.hidden.device)
            part = free if len(some) == len(rows) else free.take(index)
            places.append(index)
            parts.append(self._of_kind(kind, part, wishes[kind].allowed if kind >= 0 else None))
        stats = parts[0]
        if len(parts) > 1:
            stats = CanvasStats.concatenate(parts).spread(torch.cat(places), len(rows))
        pinned = rows.rewrite.pinned
        return stats if pinned is None else stats.where(pinned < 0, self._pinned(rows))

    def by_class(
        self, rows: Rows, *, class_of: Tensor, num_classes: int
    ) -> tuple[CanvasStats, ClassStats]:
        """See ``Head``."""
        rewrite = rows.rewrite
        classes = TokenClasses(of=class_of, count=num_classes)
        if rewrite is None or (rewrite.greedy is None and not rewrite.changes_logits()):
            return self._plain_by_class(rows, classes)
        kind_of = kinds.by_row_for_classes(rewrite, self.vocabulary.size)
        ways = {
            kinds.PLAIN: self._plain_by_class,
            kinds.REWRITTEN: self._by_class,
            kinds.MASKED: self._lenient,
            kinds.PINNED: self._pinned_by_class,
        }
        places, stats, found = [], [], []
        for kind, index in kinds.groups(kind_of):
            one, other = ways[kind](rows.take(index), classes)
            places.append(index)
            stats.append(one)
            found.append(other)
        order = torch.cat(places)
        together = CanvasStats.concatenate(stats).spread(order, len(rows))
        return together, ClassStats.concatenate(found).permuted(order)

    def candidates(self, rows: Rows, count: int) -> Tensor:
        """See ``Head``."""
        count = min(count, self.vocabulary.size)
        parts = []
        for part in rows.chunks(self._at_once(tile_bytes())):
            best = Best(count)
            for _, first, logits in logit_tiles.tiles(self.vocabulary, part.hidden, part.rewrite):
                best.add(logits, first)
            values, ids = best.over_ranks(self.vocabulary)
            parts.append(ids.masked_fill(values == -torch.inf, -1))
        return torch.cat(parts)

    def scores(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        count: int,
        ids: tuple[int, ...] | None = None,
        among: bool = False,
        raw_logits: bool = False,
    ) -> TokenScores:
        """See ``Head``."""
        if count < 0 and ids is None:  # The answer itself is [R, vocab].
            return self.whole.scores(hidden, tokens, count=count, raw_logits=raw_logits)
        # Asked for once a canvas, and shown to users: from the matrix itself.
        exact = replace(self.vocabulary, copy=None)
        at_once = self._at_once(tile_bytes())
        parts = [
            scores(
                partial(logit_tiles.tiles, exact, part, None),
                part,
                chosen,
                exact,
                count=count,
                ids=ids,
                among=among,
                raw=raw_logits,
            )
            for part, chosen in zip(
                torch.split(hidden, at_once), torch.split(tokens, at_once), strict=True
            )
        ]
        return TokenScores.concatenate(parts)

    # ---- rows that are not rewritten, or have few ids left ----

    def _plain(self, rows: Rows) -> CanvasStats:
        """Rows whose logits are not rewritten."""
        stats = self._streamed(replace(rows, rewrite=None))
        if rows.rewrite is None:
            return stats
        return replace(stats, sample=kept_token(stats.argmax, stats.sample, rows.rewrite))

    def _pinned(self, rows: Rows) -> CanvasStats:
        """Rows that have one id left."""
        assert rows.rewrite is not None
        assert rows.rewrite.pinned is not None
        only, certain = rows.rewrite.pinned.clamp(min=0), torch.ones_like(rows.temperature)
        soft = None
        if rows.self_conditioning:
            read = certain if rows.soft_top_k is None else (rows.soft_top_k >= 0).float()
            soft = self.vocabulary.mean_of(read[:, None], only[:, None])
        return CanvasStats(
            argmax=only,
            sample=only,
            entropy=torch.zeros_like(certain),
            top_prob=certain,
            margin=certain,
            soft_embedding=soft,
        )

    def _listed(self, canvas: int, rows: Rows, ids: Tensor | None) -> CanvasStats:
        """Rows of one canvas with a short list of allowed ids; None: look them up."""
        assert rows.rewrite is not None
        assert rows.rewrite.allowed is not None
        if ids is None:
            ids = torch.unique(rows.rewrite.allowed[canvas])
            ids = ids[ids >= 0]

        def chosen(part: Rows) -> CanvasStats:
            assert part.rewrite is not None
            logits = self.vocabulary.logits_of(part.hidden, ids)
            return listed_statistics(
                self.vocabulary, part, ids, rewrite_listed(logits, part.rewrite, ids)
            )

        at_once = self._at_once(TILE_COPIES * 4 * 2 * len(ids))
        return CanvasStats.concatenate([chosen(part) for part in rows.chunks(at_once)])

    # ---- statistics by class ----

    def _plain_by_class(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        return self._by_class(replace(rows, rewrite=None), classes)

    def _pinned_by_class(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        stats = self._pinned(rows)
        return stats, pinned_class_stats(stats.argmax, classes)

    def _by_class(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        """Rows without masks: one pass for both."""
        stats, found = [], []
        for part in rows.chunks(self._at_once(tile_bytes() + CLASS_BYTES * classes.count)):
            by_class = ClassPass(classes, self.vocabulary, part)
            tiles = logit_tiles.tiles_of(self.vocabulary, part)
            one, together = reading.read(self.vocabulary, part, tiles, by_class)
            stats.append(one)
            found.append(by_class.over_ranks(together))
        return CanvasStats.concatenate(stats), ClassStats.concatenate(found)

    def _lenient(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        """Rows with masks: another pass, over another distribution."""
        stats = self(rows)
        assert rows.rewrite is not None
        found = []
        bytes_a_row = tile_bytes() + CLASS_BYTES * classes.count
        if rows.rewrite.truncation is not None:
            # See ``CutRows``.
            bytes_a_row += tile_bytes() + cut.TABLE_BYTES
        for part in replace(rows, self_conditioning=False).chunks(self._at_once(bytes_a_row)):
            by_class = ClassPass(classes, self.vocabulary, part)
            tiles = logit_tiles.lenient_tiles(self.vocabulary, part, self._cuts.limits_of(part))
            _, together = reading.read(self.vocabulary, part, tiles, by_class)
            found.append(by_class.over_ranks(together))
        return stats, ClassStats.concatenate(found)

    # ---- the stream ----

    @property
    def _cuts(self) -> CutRows:
        return CutRows(self.vocabulary, self.budget)

    def _at_once(self, bytes_a_row: int) -> int:
        """Rows whose tiles fit the budget; a step of more rows reads the embedding again."""
        return max(1, self.budget // bytes_a_row)

    def _streamed(self, rows: Rows) -> CanvasStats:
        """Rows over the whole vocabulary."""
        if (chunks := reading.in_chunks(self.vocabulary, rows)) is not None:
            at_once = chunks.rows_at_once(self.vocabulary, self.budget)
            parts = [
                chunks.read(self.vocabulary, part, self.budget) for part in rows.chunks(at_once)
            ]
        else:
            parts = [
                reading.read(self.vocabulary, part, logit_tiles.tiles_of(self.vocabulary, part))[0]
                for part in rows.chunks(self._at_once(tile_bytes()))
            ]
        return CanvasStats.concatenate(parts)
