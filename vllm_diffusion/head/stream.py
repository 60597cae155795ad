"""The head that sees the vocabulary a tile at a time: no [R, vocab] tensor, the same results.

    rows that are pinned             one id is left: nothing to compute
    rows with a short list of ids    only those columns of the embedding
    rows whose distribution is cut   the best ids of the row where they are all that is left of it,
                                     else tiles without what is cut off, see ``cut``
    rows of changed logits           tiles: product, softcap, rewrite, ``absorb``, product
    all others                       tiles: product, ``absorb``, which caps, product

Statistics by class come from the same tiles. Rows whose rewrite forbids ids have theirs from a
distribution of its own, in which these only cost: their tiles are read once more.

How tiles are read: ``reading``. Which row is which: ``kinds``. That must be known on the host; a
batch in which nobody asks for any of this does not wait for the device. Under tensor parallelism
every rank keeps its rows of the embedding and exchanges statistics, [R] or [R, C] each, and the
[R, H] soft embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.rewrite import changes_logits
from vllm_diffusion.constrain.truncate import of_rows
from vllm_diffusion.constrain.window import rewrite_listed
from vllm_diffusion.head import cut, kinds, reading, sample
from vllm_diffusion.head.best import Best
from vllm_diffusion.head.classes import CLASS_BYTES, ClassPass, TokenClasses, of_pins
from vllm_diffusion.head.reference import kept_token, row_statistics
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.head.sample import sample_listed
from vllm_diffusion.head.scores import scores
from vllm_diffusion.records import CanvasStats, ClassStats, Noise, Rewrite, TokenScores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from vllm_diffusion.head.reference import ReferenceHead
    from vllm_diffusion.head.vocabulary import Vocabulary

# fp32 tiles that a row needs at its highest: its logits, its weights and what is between them in
# the torch form; the others need fewer. Measured by tests/unit/head/test_memory.py.
_TILE_COPIES: Final = 6

# Beside them, the best ids of a row while it is read.
_LIST_BYTES: Final = 128 * cut.LISTED


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingHead:
    """Same results as ``whole``, which only says what of its nature is [R, vocab]."""

    vocabulary: Vocabulary
    whole: ReferenceHead
    budget: int
    """Bytes that the tiles of a step may take, beside what is O(R * H)."""

    def __call__(
        self,
        hidden: Tensor,
        temperature: Tensor,
        noise: Noise,
        rewrite: Rewrite | None = None,
        soft_top_k: Tensor | None = None,
        *,
        all_near: bool = False,
    ) -> CanvasStats:
        """See ``Head``."""
        rows = Rows(
            hidden=hidden,
            temperature=temperature,
            noise=noise,
            rewrite=rewrite,
            soft_top_k=soft_top_k,
            all_near=all_near,
        )
        if rewrite is None:
            return self._streamed(rows)
        if not changes_logits(rewrite):
            return self._plain(rows)
        kind_of = kinds.of_rows(rewrite, self.vocabulary.size)
        ways = {
            kinds.PLAIN: self._plain,
            kinds.REWRITTEN: self._streamed,
            kinds.CUT: self._cut,
            kinds.PINNED: self._pinned,
        }
        places, parts = [], []
        for kind in torch.unique(kind_of).tolist():
            index = (kind_of == kind).nonzero()[:, 0]
            way = ways.get(kind) or partial(self._listed, kind)
            places.append(index)
            parts.append(way(rows.take(index)))
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(hidden))

    def by_class(
        self,
        hidden: Tensor,
        temperature: Tensor,
        noise: Noise,
        rewrite: Rewrite | None = None,
        soft_top_k: Tensor | None = None,
        *,
        class_of: Tensor,
        num_classes: int,
    ) -> tuple[CanvasStats, ClassStats]:
        """See ``Head``."""
        rows = Rows(
            hidden=hidden,
            temperature=temperature,
            noise=noise,
            rewrite=rewrite,
            soft_top_k=soft_top_k,
        )
        classes = TokenClasses(of=class_of, count=num_classes)
        if rewrite is None or (rewrite.greedy is None and not changes_logits(rewrite)):
            return self._plain_by_class(rows, classes)
        kind_of = kinds.of_classes(rewrite, self.vocabulary.size)
        ways = {
            kinds.PLAIN: self._plain_by_class,
            kinds.REWRITTEN: self._by_class,
            kinds.MASKED: self._lenient,
            kinds.PINNED: self._pinned_by_class,
        }
        places, stats, found = [], [], []
        for kind in torch.unique(kind_of).tolist():
            index = (kind_of == kind).nonzero()[:, 0]
            one, other = ways[kind](rows.take(index), classes)
            places.append(index)
            stats.append(one)
            found.append(other)
        order = torch.cat(places)
        together = CanvasStats.concatenate(stats).spread(order, len(hidden))
        return together, ClassStats.concatenate(found).spread(order)

    def candidates(self, hidden: Tensor, rewrite: Rewrite, count: int) -> Tensor:
        """See ``Head``."""
        count = min(count, self.vocabulary.size)
        parts = []
        for rows in self._chunks(hidden):
            best = Best(count)
            for _, first, logits in reading.tiles(
                self.vocabulary, hidden[rows], rewrite.rows(rows)
            ):
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
        # Asked for once a canvas, and told to users: of the matrix itself.
        exact = replace(self.vocabulary, copy=None)
        parts = [
            scores(
                partial(reading.tiles, exact, hidden[rows], None),
                hidden[rows],
                tokens[rows],
                exact,
                count=count,
                ids=ids,
                among=among,
                raw=raw_logits,
            )
            for rows in self._chunks(hidden)
        ]
        return TokenScores.concatenate(parts)

    # ---- rows of which little is left, or nothing is changed ----

    def _plain(self, rows: Rows) -> CanvasStats:
        """Rows whose logits are what they are."""
        stats = self._streamed(replace(rows, rewrite=None))
        if rows.rewrite is None:
            return stats
        return replace(stats, sample=kept_token(stats.argmax, stats.sample, rows.rewrite))

    def _pinned(self, rows: Rows) -> CanvasStats:
        """Rows that have one id left."""
        assert rows.rewrite is not None
        assert rows.rewrite.pinned is not None
        only, certain = rows.rewrite.pinned, torch.ones_like(rows.temperature)
        read = certain if rows.soft_top_k is None else (rows.soft_top_k >= 0).float()
        return CanvasStats(
            argmax=only,
            sample=only,
            entropy=torch.zeros_like(certain),
            top_prob=certain,
            margin=certain,
            soft_embedding=self.vocabulary.mean_of(read[:, None], only[:, None]),
        )

    def _listed(self, canvas: int, rows: Rows) -> CanvasStats:
        """Rows of one canvas that may say nothing but a few ids."""
        assert rows.rewrite is not None
        assert rows.rewrite.allowed is not None
        ids = torch.unique(rows.rewrite.allowed[canvas])
        ids = ids[ids >= 0]

        def chosen(part: Rows) -> CanvasStats:
            assert part.rewrite is not None
            logits = self.vocabulary.logits_of(part.hidden, ids)
            return self._among(part, ids, rewrite_listed(logits, part.rewrite, ids))

        at_once = self._at_once(_TILE_COPIES * 4 * 2 * len(ids))
        return CanvasStats.concatenate([chosen(part) for part in rows.chunks(at_once)])

    def _among(self, rows: Rows, ids: Tensor, logits: Tensor) -> CanvasStats:
        """Of rows whose every id that is left is among ``ids`` [N] or [R, N], ascending."""
        stats = row_statistics(
            logits,
            rows,
            draw=lambda weight: sample_listed(weight, ids, self.vocabulary.size, rows.noise),
            soft_embedding=lambda weight: self.vocabulary.mean_of(weight, ids),
        )
        return stats.renamed(ids)

    # ---- rows whose distribution is cut ----

    def _cut(self, rows: Rows) -> CanvasStats:
        """Rows that keep the ids above a limit."""
        wide, places, parts = [], [], []
        start = 0
        for part in rows.chunks(self._at_once(_tile_bytes() + _LIST_BYTES)):
            index = torch.arange(start, start + len(part), device=part.hidden.device)
            start += len(part)
            found = self._survivors(part)
            done = found.complete.nonzero()[:, 0]
            rest = (~found.complete).nonzero()[:, 0]
            if len(done):
                places.append(index[done])
                parts.append(self._survived(part.take(done), found, done))
            if len(rest):
                wide.append((index[rest], found.values[rest, 0]))
        if wide:
            index = torch.cat([rest for rest, _ in wide])
            places.append(index)
            parts.append(
                self._above_limits(rows.take(index), torch.cat([best for _, best in wide]))
            )
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(rows))

    def _above_limits(self, rows: Rows, best: Tensor) -> CanvasStats:
        """Rows that keep more ids than are listed; ``best`` [R] fp32 is their largest logit."""
        parts, start = [], 0
        # Limit and statistics of the same rows at once: a product over other rows rounds otherwise,
        # and an id that is just on its row's limit would be lost.
        for part in rows.chunks(self._at_once(2 * _tile_bytes() + cut.TABLE_BYTES)):
            limit = self._limits(part, best[start : start + len(part)])
            tiles = reading.tiles_of(self.vocabulary, part, limit)
            parts.append(reading.read(self.vocabulary, part, tiles)[0])
            start += len(part)
        return CanvasStats.concatenate(parts)

    def _survivors(self, rows: Rows) -> cut.Survivors:
        assert rows.rewrite is not None
        assert rows.rewrite.truncation is not None
        asked = of_rows(rows.rewrite.truncation, rows.rewrite.canvas)
        tiles = reading.tiles(self.vocabulary, rows.hidden, rows.rewrite)
        return cut.survivors(tiles, rows.temperature, asked, self.vocabulary)

    def _survived(self, rows: Rows, found: cut.Survivors, index: Tensor) -> CanvasStats:
        """Rows whose every id that stays has been found."""
        assert rows.rewrite is not None
        values = found.values[index]
        out = values / rows.temperature[:, None] < found.limit[index, None]
        # They come best first: what no row keeps can go.
        most = len(out[0]) - int(out.sum(dim=1).amin())
        ids, order = found.ids[index, :most].sort(dim=1)
        logits = values.masked_fill(out, -torch.inf)[:, :most].gather(1, order)
        rest = replace(rows, rewrite=replace(rows.rewrite, truncation=None))
        return self._among(rest, ids, logits)

    def _limits(self, rows: Rows, best: Tensor) -> Tensor:
        """[R] fp32 where rows are cut that keep more ids than are listed, see ``_above_limits``."""
        assert rows.rewrite is not None
        assert rows.rewrite.truncation is not None
        return cut.limits(
            partial(reading.tiles, self.vocabulary, rows.hidden, rows.rewrite),
            best,
            rows.temperature,
            of_rows(rows.rewrite.truncation, rows.rewrite.canvas),
            self.vocabulary,
        )

    # ---- statistics by class ----

    def _plain_by_class(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        return self._by_class(replace(rows, rewrite=None), classes)

    def _pinned_by_class(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        stats = self._pinned(rows)
        return stats, of_pins(stats.argmax, classes)

    def _by_class(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        """Rows that may say anything: one pass for both."""
        stats, found = [], []
        for part in rows.chunks(self._at_once(_tile_bytes() + CLASS_BYTES * classes.count)):
            by_class = ClassPass(classes, self.vocabulary, part)
            tiles = reading.tiles_of(self.vocabulary, part)
            one, together = reading.read(self.vocabulary, part, tiles, by_class)
            stats.append(one)
            found.append(by_class.over_ranks(together))
        return CanvasStats.concatenate(stats), ClassStats.concatenate(found)

    def _lenient(self, rows: Rows, classes: TokenClasses) -> tuple[CanvasStats, ClassStats]:
        """Rows with masks: another pass, over another distribution."""
        stats = self(rows.hidden, rows.temperature, rows.noise, rows.rewrite, rows.soft_top_k)
        assert rows.rewrite is not None
        found, unread = [], torch.full_like(rows.noise.step, -1)
        bytes_a_row = _tile_bytes() + CLASS_BYTES * classes.count
        if rows.rewrite.truncation is not None:
            # See ``_above_limits``.
            bytes_a_row += _tile_bytes() + cut.TABLE_BYTES
        for part in replace(rows, soft_top_k=unread).chunks(self._at_once(bytes_a_row)):
            by_class = ClassPass(classes, self.vocabulary, part)
            tiles = reading.lenient_tiles(self.vocabulary, part, self._cut_limits(part))
            _, together = reading.read(self.vocabulary, part, tiles, by_class)
            found.append(by_class.over_ranks(together))
        return stats, ClassStats.concatenate(found)

    def _cut_limits(self, rows: Rows) -> Tensor:
        """[R] fp32 the least tempered logit that a cut leaves, -inf for rows without one."""
        assert rows.rewrite is not None
        limit = torch.full_like(rows.temperature, -torch.inf)
        if rows.rewrite.truncation is None:
            return limit
        asked = kinds.cuts(rows.rewrite.truncation, self.vocabulary.size)
        cuts = asked[rows.rewrite.canvas]
        if not bool(cuts.any()):
            return limit
        found = self._survivors(rows)
        limit = torch.where(cuts, found.limit, limit)
        wide = cuts & ~found.complete
        if not bool(wide.any()):
            return limit
        return torch.where(wide, self._limits(rows, found.values[:, 0]), limit)

    # ---- the stream ----

    def _at_once(self, bytes_a_row: int) -> int:
        """Rows whose tiles fit the budget; a wider step reads the embedding more than once."""
        return max(1, self.budget // bytes_a_row)

    def _chunks(self, hidden: Tensor) -> Iterator[slice]:
        at_once = self._at_once(_tile_bytes())
        for start in range(0, len(hidden), at_once):
            yield slice(start, start + at_once)

    def _streamed(self, rows: Rows) -> CanvasStats:
        """Rows over the whole vocabulary."""
        if (chunks := reading.in_chunks(self.vocabulary, rows)) is not None:
            at_once = chunks.rows_at_once(self.vocabulary, self.budget)
            parts = [
                chunks.read(self.vocabulary, part, self.budget) for part in rows.chunks(at_once)
            ]
        else:
            parts = [
                reading.read(self.vocabulary, part, reading.tiles_of(self.vocabulary, part))[0]
                for part in rows.chunks(self._at_once(_tile_bytes()))
            ]
        return CanvasStats.concatenate(parts)


def _tile_bytes() -> int:
    """What the tiles of a row take at their highest."""
    return _TILE_COPIES * 4 * sample.TILE
