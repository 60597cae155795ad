"""The head that sees the vocabulary a tile at a time: no [R, vocab] tensor, the same results.

    rows that are pinned             one id is left: nothing to compute
    rows with a short list of ids    only those columns of the embedding
    rows whose distribution is cut   the best ids of the row where they are all that is left of it,
                                     else tiles without what is cut off, see ``cut``
    all others                       tiles: product, softcap, rewrite, ``absorb``, product

The products are the library's. What is between them is ``tile.absorb``: in C++ on a CPU, see
``native``, in Triton on a GPU, see ``fused``, or in CUDA where that is asked for, see ``cuda``.
Which rows are which must be known on the host; a batch in which nobody asks for any of this does
not wait for the device. Under tensor parallelism every rank keeps its rows of the embedding and
exchanges statistics, [R] each, and the [R, H] soft embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.truncate import of_rows
from vllm_diffusion.constrain.window import TiledRewrite, rewrite_listed
from vllm_diffusion.head import cut, native, sample, tile
from vllm_diffusion.head.best import Best
from vllm_diffusion.head.reference import row_statistics
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.head.sample import sample_listed, tile_uniforms
from vllm_diffusion.head.soft import SoftEmbedding
from vllm_diffusion.head.tile import RunningStats
from vllm_diffusion.records import CanvasStats, Noise, Rewrite, TokenScores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from vllm_diffusion.head.reference import ReferenceHead
    from vllm_diffusion.head.vocabulary import Vocabulary

# A list longer than this is a mask: its columns of the embedding would have to be copied.
LISTED_AT_MOST: Final = 4096

# fp32 tiles that a row needs at its highest: its logits, its weights and what is between them in
# the torch form; the others need fewer. Measured by tests/unit/head/test_memory.py.
_TILE_COPIES: Final = 6

# Beside them, the best ids of a row while it is read.
_LIST_BYTES: Final = 128 * cut.LISTED

_STREAMED, _CUT, _PINNED = -1, -2, -3  # kinds of rows; from 0 on: the canvas whose list counts


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
    ) -> CanvasStats:
        """See ``Head``."""
        rows = Rows(
            hidden=hidden,
            temperature=temperature,
            noise=noise,
            rewrite=rewrite,
            soft_top_k=soft_top_k,
        )
        if rewrite is None or (kinds := self._kinds(rewrite)) is None:
            return self._streamed(rows)
        ways = {_STREAMED: self._streamed, _CUT: self._cut, _PINNED: self._pinned}
        places, parts = [], []
        for kind in torch.unique(kinds).tolist():
            index = (kinds == kind).nonzero()[:, 0]
            way = ways.get(kind) or partial(self._listed, kind)
            places.append(index)
            parts.append(way(rows.take(index)))
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(hidden))

    def candidates(self, hidden: Tensor, rewrite: Rewrite, count: int) -> Tensor:
        """See ``Head``."""
        count = min(count, self.vocabulary.size)
        parts = []
        for rows in self._chunks(hidden):
            best = Best(count)
            for _, first, logits in self._tiles(hidden[rows], rewrite.rows(rows)):
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
        parts = [
            self._scores(hidden[rows], tokens[rows], count, ids, among=among, raw=raw_logits)
            for rows in self._chunks(hidden)
        ]
        return TokenScores.concatenate(parts)

    # ---- which rows go which way ----

    def _kinds(self, rewrite: Rewrite) -> Tensor | None:
        """[R] int64 the kind of every row, None where all of them are streamed."""
        if rewrite.allowed is None and rewrite.truncation is None and rewrite.pinned is None:
            return None
        kinds = torch.full_like(rewrite.canvas, _STREAMED)
        if (asked := rewrite.truncation) is not None:
            cuts = (asked.min_p > 0) | (asked.top_k < self.vocabulary.size) | (asked.top_p < 1)
            kinds = torch.where(cuts[rewrite.canvas], _CUT, kinds)
        if rewrite.allowed is not None:
            listed = (rewrite.allowed >= 0).sum(dim=1)
            short = (listed > 0) & (listed <= LISTED_AT_MOST)
            kinds = torch.where(short[rewrite.canvas], rewrite.canvas, kinds)
        if rewrite.pinned is not None:
            kinds = torch.where(rewrite.pinned >= 0, _PINNED, kinds)
        return kinds if bool((kinds != _STREAMED).any()) else None

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
        for part in rows.chunks(self._at_once(_TILE_COPIES * 4 * sample.TILE + _LIST_BYTES)):
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
            parts.append(self._wide(rows.take(index), torch.cat([best for _, best in wide])))
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(rows))

    def _survivors(self, rows: Rows) -> cut.Survivors:
        assert rows.rewrite is not None
        assert rows.rewrite.truncation is not None
        asked = of_rows(rows.rewrite.truncation, rows.rewrite.canvas)
        tiles = self._tiles(rows.hidden, rows.rewrite)
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

    def _wide(self, rows: Rows, best: Tensor) -> CanvasStats:
        """Rows that keep more ids than are listed."""
        limits, start = [], 0
        for part in rows.chunks(
            self._at_once(2 * _TILE_COPIES * 4 * sample.TILE + cut.TABLE_BYTES)
        ):
            assert part.rewrite is not None
            assert part.rewrite.truncation is not None
            limits.append(
                cut.limits(
                    partial(self._tiles, part.hidden, part.rewrite),
                    best[start : start + len(part)],
                    part.temperature,
                    of_rows(part.rewrite.truncation, part.rewrite.canvas),
                    self.vocabulary,
                )
            )
            start += len(part)
        return self._streamed(rows, torch.cat(limits))

    # ---- the stream ----

    def _at_once(self, bytes_a_row: int) -> int:
        """Rows whose tiles fit the budget; a wider step reads the embedding more than once."""
        return max(1, self.budget // bytes_a_row)

    def _chunks(self, hidden: Tensor) -> Iterator[slice]:
        at_once = self._at_once(_TILE_COPIES * 4 * sample.TILE)
        for start in range(0, len(hidden), at_once):
            yield slice(start, start + at_once)

    def _streamed(self, rows: Rows, limit: Tensor | None = None) -> CanvasStats:
        """Rows over the whole vocabulary, without what is below ``limit`` [R] fp32."""
        parts, start = [], 0
        for part in rows.chunks(self._at_once(_TILE_COPIES * 4 * sample.TILE)):
            mine = None if limit is None else limit[start : start + len(part), None]
            parts.append(self._stream(part, mine))
            start += len(part)
        return CanvasStats.concatenate(parts)

    def _stream(self, rows: Rows, limit: Tensor | None) -> CanvasStats:
        vocabulary, rewrite, temperature = self.vocabulary, rows.rewrite, rows.temperature
        gumbel, inside = tile_uniforms(rows.noise, -(-vocabulary.size // sample.TILE))
        running = RunningStats.of_nothing(len(rows), temperature.device)
        soft = SoftEmbedding(vocabulary, rows.soft_top_k, running.top)
        for number, first, logits in self._tiles(rows.hidden, rewrite, cap=rewrite is not None):
            if limit is not None:
                logits.masked_fill_(logits / temperature[:, None] < limit, -torch.inf)
            if rewrite is not None:
                tile.without_infinities(logits)
            soft.see(logits, first)
            weight, shrink = _absorb(logits)(
                running,
                logits,
                first=first,
                softcap=vocabulary.softcap if rewrite is None else None,
                temperature=temperature,
                uniforms=(gumbel[:, number], inside[:, number]),
            )
            soft.add(weight, shrink, first)
        together, shrink = running.over_ranks(temperature, vocabulary)
        drawn = together.sample
        if rewrite is not None and rewrite.greedy is not None:
            drawn = torch.where(rewrite.greedy[rewrite.canvas], together.argmax, drawn)
        beside = ((together.second - together.top) / temperature).exp()
        return CanvasStats(
            argmax=together.argmax,
            sample=drawn,
            entropy=together.mass.log() - together.moment / together.mass,
            top_prob=1 / together.mass,
            margin=(1 - beside) / together.mass,
            soft_embedding=soft.over_ranks(
                together, shrink, temperature, capped=rewrite is not None
            ),
        )

    def _tiles(
        self, hidden: Tensor, rewrite: Rewrite | None, *, cap: bool = True
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Number, first id and logits [R, n] of this rank's tiles, good until the next one.

        Capped and rewritten, in fp32; or, not capped, just what the product gives.
        """
        vocabulary = self.vocabulary
        end = vocabulary.first + len(vocabulary)
        starts = range(vocabulary.first, end, sample.TILE)
        edges = torch.tensor([*starts, end], device=hidden.device)
        tiled = None if rewrite is None else TiledRewrite(rewrite, edges, vocabulary.size)
        buffer = None
        for number, first in enumerate(starts):
            rows = vocabulary.output[first - vocabulary.first :][: sample.TILE]
            if buffer is None or buffer.shape[1] != len(rows):
                buffer = hidden.new_empty(len(hidden), len(rows))
            logits = torch.mm(hidden, rows.T, out=buffer)
            if cap:
                logits = vocabulary.capped(logits.float())
            if tiled is not None:
                logits = tiled.apply(logits, number, first)
            yield first // sample.TILE, first, logits

    def _scores(
        self,
        hidden: Tensor,
        tokens: Tensor,
        count: int,
        ids: tuple[int, ...] | None,
        *,
        among: bool,
        raw: bool,
    ) -> TokenScores:
        vocabulary = self.vocabulary
        if ids is None:
            asked = tokens[:, None]
            best = Best(min(count, vocabulary.size))
        else:
            beside = torch.tensor(ids, device=hidden.device).expand(len(hidden), -1)
            asked = torch.cat([tokens[:, None], beside], dim=1)
            best = Best(0)
            if among:
                distinct, place = torch.unique(asked, return_inverse=True)
                values = vocabulary.logits_of(hidden, distinct).gather(1, place)
                return _scored(asked, values, values[:, 1:].logsumexp(1), values[:, 1:], raw=raw)
        # The logits asked for come from the same products as those they are ranked among.
        values = torch.zeros(asked.shape, device=hidden.device)
        top = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        mass = torch.zeros_like(top)
        for _, first, logits in self._tiles(hidden, None):
            place = asked - first
            here = (place >= 0) & (place < logits.shape[1])
            values = torch.where(here, logits.gather(1, torch.where(here, place, 0)), values)
            best.add(logits, first)
            higher = torch.maximum(top, logits.amax(dim=1))
            mass = mass * (top - higher).exp() + (logits - higher[:, None]).exp().sum(dim=1)
            top = higher
        values = vocabulary.add(values)
        total = vocabulary.gather(top + mass.log()).logsumexp(dim=0)
        ranks = torch.zeros_like(top)  # counts are exact in fp32 below 2**24
        for _, _, logits in self._tiles(hidden, None):
            ranks += (logits >= values[:, :1]).sum(dim=1)
        if ids is None:
            more, listed = best.over_ranks(vocabulary)
            values, asked = torch.cat([values, more], dim=1), torch.cat([asked, listed], dim=1)
        if not raw:
            values = values - total[:, None]
        return TokenScores(ids=asked, values=values, ranks=vocabulary.add(ranks).long())


def _absorb(logits: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """The form of ``tile.absorb`` that is fastest for these logits."""
    if logits.is_cuda:
        from vllm_diffusion.head import cuda

        if cuda.chosen():
            return cuda.absorb
        from vllm_diffusion.head import fused

        return fused.absorb
    return native.absorb if native.fits(logits) else tile.absorb


def _scored(ids: Tensor, values: Tensor, total: Tensor, field: Tensor, *, raw: bool) -> TokenScores:
    """Scores among ``field`` alone, the chosen id in the first column of ``values``."""
    ranks = (field >= values[:, :1]).sum(dim=1)
    return TokenScores(ids=ids, values=values if raw else values - total[:, None], ranks=ranks)
