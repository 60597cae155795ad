"""The head that sees the vocabulary a tile at a time: no [R, vocab] tensor, the same results.

    rows that are pinned             one id is left: nothing to compute
    rows with a short list of ids    only those columns of the embedding
    rows whose distribution is cut   the reference head: a cut needs the order of the whole row
    all others                       tiles: product, softcap, rewrite, ``absorb``, product

The products are the library's. What is between them is ``tile.absorb``: in C++ on a CPU, see
``native``, in Triton on a GPU, see ``fused``, or in CUDA where that is asked for, see ``cuda``.
Which rows are which must be known on the host; a batch in which nobody asks for any of this does
not wait for the device. Under tensor parallelism every rank keeps its rows of the embedding and
exchanges statistics, [R] each, and the [R, H] soft embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.window import TiledRewrite, rewrite_listed
from vllm_diffusion.head import native, sample, tile
from vllm_diffusion.head.reference import row_statistics
from vllm_diffusion.head.sample import sample_listed, tile_uniforms
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

_STREAMED, _WHOLE, _PINNED = -1, -2, -3  # kinds of rows; from 0 on: the canvas whose list counts


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingHead:
    """Same results as ``whole``, which takes the rows that need all of their logits at once."""

    vocabulary: Vocabulary
    whole: ReferenceHead
    budget: int
    """Bytes that the tiles of a step may take, beside what is O(R * H)."""

    def __call__(
        self, hidden: Tensor, temperature: Tensor, noise: Noise, rewrite: Rewrite | None = None
    ) -> CanvasStats:
        """See ``Head``."""
        if rewrite is None or (kinds := self._kinds(rewrite)) is None:
            return self._chunked(hidden, temperature, noise, rewrite)
        places, parts = [], []
        for kind in torch.unique(kinds).tolist():
            index = (kinds == kind).nonzero()[:, 0]
            mine = hidden[index], temperature[index], noise.rows(index), rewrite.rows(index)
            if kind == _STREAMED:
                part = self._chunked(*mine)
            elif kind == _WHOLE:
                part = self.whole(*mine)
            elif kind == _PINNED:
                part = self._pinned(mine[0], mine[3])
            else:
                part = self._listed(kind, *mine)
            places.append(index)
            parts.append(part)
        return CanvasStats.concatenate(parts).spread(torch.cat(places), len(hidden))

    def candidates(self, hidden: Tensor, rewrite: Rewrite, count: int) -> Tensor:
        """See ``Head``."""
        count = min(count, self.vocabulary.size)
        parts = []
        for rows in self._chunks(hidden):
            best = _Best(count)
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
        if (cut := rewrite.truncation) is not None:
            cuts = (cut.min_p > 0) | (cut.top_k < self.vocabulary.size) | (cut.top_p < 1)
            kinds = torch.where(cuts[rewrite.canvas], _WHOLE, kinds)
        if rewrite.allowed is not None:
            listed = (rewrite.allowed >= 0).sum(dim=1)
            short = (listed > 0) & (listed <= LISTED_AT_MOST)
            kinds = torch.where(short[rewrite.canvas], rewrite.canvas, kinds)
        if rewrite.pinned is not None:
            kinds = torch.where(rewrite.pinned >= 0, _PINNED, kinds)
        return kinds if bool((kinds != _STREAMED).any()) else None

    def _pinned(self, hidden: Tensor, rewrite: Rewrite) -> CanvasStats:
        """Rows that have one id left."""
        assert rewrite.pinned is not None
        certain = torch.ones(len(hidden), device=hidden.device)
        ids, place = torch.unique(rewrite.pinned, return_inverse=True)
        return CanvasStats(
            argmax=rewrite.pinned,
            sample=rewrite.pinned,
            entropy=torch.zeros_like(certain),
            top_prob=certain,
            margin=certain,
            soft_embedding=self.vocabulary.mean_of(torch.eye(len(ids), device=ids.device), ids)[
                place
            ],
        )

    def _listed(
        self, canvas: int, hidden: Tensor, temperature: Tensor, noise: Noise, rewrite: Rewrite
    ) -> CanvasStats:
        """Rows of one canvas that may say nothing but a few ids."""
        assert rewrite.allowed is not None
        ids = torch.unique(rewrite.allowed[canvas])
        ids = ids[ids >= 0]
        logits = rewrite_listed(self.vocabulary.logits_of(hidden, ids), rewrite, ids)
        stats = row_statistics(
            logits,
            temperature,
            rewrite,
            draw=lambda weight: sample_listed(weight, ids, self.vocabulary.size, noise),
            soft_embedding=lambda weight: self.vocabulary.mean_of(weight, ids),
        )
        return stats.renamed(ids)

    # ---- the stream ----

    def _chunks(self, hidden: Tensor) -> Iterator[slice]:
        """Rows whose tiles fit the budget; a wider step reads the embedding more than once."""
        at_once = max(1, self.budget // (_TILE_COPIES * 4 * sample.TILE))
        for start in range(0, len(hidden), at_once):
            yield slice(start, start + at_once)

    def _chunked(
        self, hidden: Tensor, temperature: Tensor, noise: Noise, rewrite: Rewrite | None
    ) -> CanvasStats:
        parts = [
            self._streamed(
                hidden[rows],
                temperature[rows],
                noise.rows(rows),
                None if rewrite is None else rewrite.rows(rows),
            )
            for rows in self._chunks(hidden)
        ]
        return parts[0] if len(parts) == 1 else CanvasStats.concatenate(parts)

    def _streamed(
        self, hidden: Tensor, temperature: Tensor, noise: Noise, rewrite: Rewrite | None
    ) -> CanvasStats:
        vocabulary, dtype = self.vocabulary, self.vocabulary.embedding.dtype
        gumbel, inside = tile_uniforms(noise, -(-vocabulary.size // sample.TILE))
        running = RunningStats.of_nothing(len(hidden), hidden.device)
        soft = torch.zeros(len(hidden), vocabulary.embedding.shape[1], device=hidden.device)
        for number, first, logits in self._tiles(hidden, rewrite, cap=rewrite is not None):
            rows = slice(first - vocabulary.first, first - vocabulary.first + logits.shape[1])
            weight, shrink = _absorb(logits)(
                running,
                logits if rewrite is None else tile.without_infinities(logits),
                first=first,
                softcap=vocabulary.softcap if rewrite is None else None,
                temperature=temperature,
                uniforms=(gumbel[:, number], inside[:, number]),
            )
            soft.mul_(shrink[:, None])
            if dtype == torch.float32:
                soft.addmm_(weight, vocabulary.embedding[rows])
            else:
                soft.add_(weight.to(dtype) @ vocabulary.embedding[rows])
        together, shrink = running.over_ranks(temperature, vocabulary)
        soft = vocabulary.add(soft.mul_((shrink / together.mass)[:, None]))
        greedy = None if rewrite is None else rewrite.greedy
        drawn = together.sample
        if rewrite is not None and greedy is not None:
            drawn = torch.where(greedy[rewrite.canvas], together.argmax, drawn)
        beside = ((together.second - together.top) / temperature).exp()
        return CanvasStats(
            argmax=together.argmax,
            sample=drawn,
            entropy=together.mass.log() - together.moment / together.mass,
            top_prob=1 / together.mass,
            margin=(1 - beside) / together.mass,
            soft_embedding=soft.to(dtype) * vocabulary.scale,
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
            best = _Best(min(count, vocabulary.size))
        else:
            beside = torch.tensor(ids, device=hidden.device).expand(len(hidden), -1)
            asked = torch.cat([tokens[:, None], beside], dim=1)
            best = _Best(0)
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


class _Best:
    """The largest logits of every row so far."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._values: list[Tensor] = []
        self._ids: list[Tensor] = []

    def add(self, logits: Tensor, first: int) -> None:
        """Take [R, n] logits of the ids from ``first`` on in."""
        best = logits.topk(min(self._count, logits.shape[1]), dim=1)
        self._keep([*self._values, best.values], [*self._ids, best.indices + first])

    def over_ranks(self, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        """[R, count] values and ids, best first."""
        values = vocabulary.gather(self._values[0])
        ids = vocabulary.gather(self._ids[0].float()).long()
        self._keep(list(values), list(ids))
        return self._values[0], self._ids[0]

    def _keep(self, values: list[Tensor], ids: list[Tensor]) -> None:
        together = torch.cat(values, dim=1)
        best = together.topk(min(self._count, together.shape[1]), dim=1)
        self._values = [best.values]
        self._ids = [torch.cat(ids, dim=1).gather(1, best.indices)]
