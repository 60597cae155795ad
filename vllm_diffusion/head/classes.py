"""Statistics of rows by class of tokens, over the tiles of the vocabulary seen so far.

Every class has a reference of its own, its largest logit so far: a class is measured as exactly
where the row's best token is a thousand nats above it as where that token is its own. Column 0 of
what is running is a bin for what nobody reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.head import native, native_classes
from vllm_diffusion.head.sample import class_keys, race
from vllm_diffusion.records import ClassStats

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.native_classes import TileOrder
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.tile import RunningStats
    from vllm_diffusion.head.vocabulary import Vocabulary

# Finite stand-ins for -inf, as in ``tile``: no token of the class so far.
_LOWEST: Final = -1e30
_MASKED: Final = -3e30
CLASS_BYTES: Final = 4 * 24
"""What a row takes a class at its highest; measured by tests/unit/head/test_memory.py."""

RECORD: Final = 8
"""Words of a class in a row, one of them unused."""

_NO_ID: Final = torch.iinfo(torch.int32).max


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenClasses:
    """Which class every token belongs to, see ``Head.by_class``."""

    of: Tensor  # [V] int32
    count: int

    def lowest(self, vocabulary: Vocabulary) -> Tensor:
        """[C] int32, the lowest id of every class on this rank, -1 for none and for class 0."""
        mine = self.of[vocabulary.first : vocabulary.first + len(vocabulary)].long()
        ids = torch.arange(len(mine), dtype=torch.int32, device=mine.device) + vocabulary.first
        lowest = torch.full((self.count,), _NO_ID, dtype=torch.int32, device=mine.device)
        lowest.scatter_reduce_(0, mine, ids, "amin")
        lowest[:1].fill_(_NO_ID)
        return lowest.masked_fill_(lowest == _NO_ID, -1)


@dataclass(slots=True, kw_only=True)
class RunningClasses:
    """Statistics of R rows and C classes over the ids so far; changed in place, tile by tile."""

    best: Tensor  # [R, C] fp32, largest logit
    second: Tensor  # [R, C] fp32, the next one
    mass: Tensor  # [R, C] fp32, sum of w = exp(s), s = (logit - best) / T
    moment: Tensor  # [R, C] fp32, sum of w * s
    score: Tensor  # [R, C] fp32, best score of the race, its weight counted against best
    argmax: Tensor  # [R, C] int32, id of the largest logit; before one is known, any of the class
    sample: Tensor  # [R, C] int32, who leads the race; before one does, any of the class

    @staticmethod
    def of_nothing(rows: int, classes: TokenClasses, vocabulary: Vocabulary) -> RunningClasses:
        """Before the first tile."""
        lowest = classes.lowest(vocabulary)
        # Side by side, as the C++ form reads them.
        values = torch.zeros(rows, classes.count, RECORD, device=lowest.device)
        ids = values.view(torch.int32)
        values[..., 0], values[..., 1] = _LOWEST, _MASKED
        ids[..., 5], ids[..., 6] = lowest, lowest
        best, second, mass, moment, score = values.unbind(-1)[:5]
        return RunningClasses(
            best=best,
            second=second,
            mass=mass,
            moment=moment,
            score=score,
            argmax=ids[..., 5],
            sample=ids[..., 6],
        )

    def over_ranks(self, temperature: Tensor, vocabulary: Vocabulary) -> RunningClasses:
        """Of all ranks together, equal on every rank; see ``RunningStats.over_ranks``."""
        if len(vocabulary) == vocabulary.size:
            return self
        ids = self.argmax.float(), self.sample.float()
        mine = [self.best, self.second, self.mass, self.moment, self.score, *ids]
        best, second, mass, moment, score, argmax, sample = vocabulary.gather(
            torch.stack(mine)
        ).unbind(1)
        top = best.amax(dim=0)
        shift = (best - top) / temperature[:, None]
        shrink = shift.exp()
        # A rank without the class never gives it a token, not even in a row of NaN.
        here = argmax >= 0
        winner = best.masked_fill(~here, -torch.inf).argmax(dim=0, keepdim=True)
        score = (shrink * score).masked_fill_(~here, -torch.inf)
        drawn = score.argmax(dim=0, keepdim=True)
        return RunningClasses(
            best=top,
            second=torch.cat([best, second]).topk(2, dim=0).values[1],
            mass=(shrink * mass).sum(dim=0),
            moment=(shrink * (moment + shift * mass)).sum(dim=0),
            score=score.amax(dim=0),
            argmax=argmax.gather(0, winner)[0].int(),
            sample=sample.gather(0, drawn)[0].int(),
        )

    def statistics(self, together: RunningStats, temperature: Tensor) -> ClassStats:
        """What is known after the last tile.

        Args:
            together: of the rows, over the same ids.
            temperature: [R] fp32.
        """
        nobody = self.argmax < 0
        nobody[:, 0] = True

        def share(logit: Tensor) -> Tensor:
            return (logit - together.top[:, None]) / temperature[:, None] - together.mass.log()[
                :, None
            ]

        best, mass = share(self.best), self.mass.log()
        alone = nobody | (self.second <= _LOWEST)
        return ClassStats(
            log_mass=(best + mass).masked_fill_(nobody, -torch.inf),
            entropy=(mass - self.moment / self.mass).masked_fill_(nobody, 0.0),
            best=self.argmax.long().masked_fill_(nobody, -1),
            best_log_prob=best.masked_fill_(nobody, -torch.inf),
            second_log_prob=share(self.second).masked_fill_(alone, -torch.inf),
            sample=self.sample.long().masked_fill_(nobody, -1),
        )


class ClassPass:
    """Sees every tile before the row pass uses it up.

    Args:
        classes: of the tokens.
        vocabulary: of this rank.
        rows: that the tiles are of.
    """

    def __init__(self, classes: TokenClasses, vocabulary: Vocabulary, rows: Rows) -> None:
        self._classes, self._vocabulary, self._rows = classes, vocabulary, rows
        key = class_keys(rows.noise)
        self._key = key[0].contiguous(), key[1].contiguous()
        self._temperature = rows.temperature.contiguous()
        self._running = RunningClasses.of_nothing(len(rows), classes, vocabulary)

    def see(self, logits: Tensor, first: int, softcap: float | None) -> None:
        """Take in the logits [R, n] of the ids from ``first`` on, which stay as they are."""
        if native.fits(logits):
            form = partial(native_classes.absorb, order=self._order(first))
        else:
            form = partial(absorb, class_of=self._classes.of[first : first + logits.shape[1]])
        form(
            self._running,
            logits,
            first=first,
            softcap=softcap,
            temperature=self._temperature,
            key=self._key,
        )

    def _order(self, first: int) -> TileOrder:
        vocabulary, classes = self._vocabulary, self._classes
        orders = native_classes.orders(classes.of, classes.count, vocabulary.first, len(vocabulary))
        return orders[vocabulary.tiles().index(first)]

    def over_ranks(self, together: RunningStats) -> ClassStats:
        """Of all ranks: see ``RunningClasses.statistics``."""
        temperature, rewrite = self._rows.temperature, self._rows.rewrite
        running = self._running.over_ranks(temperature, self._vocabulary)
        if rewrite is not None and rewrite.greedy is not None:
            greedy = rewrite.greedy[rewrite.canvas, None]
            running.sample = torch.where(greedy, running.argmax, running.sample)
        return running.statistics(together, temperature)


def absorb(
    running: RunningClasses,
    logits: Tensor,
    *,
    first: int,
    softcap: float | None,
    temperature: Tensor,
    key: tuple[Tensor, Tensor],
    class_of: Tensor,
) -> None:
    """Take one tile in.

    Args:
        running: of the tiles before; changed.
        logits: [R, n] fp32, or anything that becomes fp32; none is -inf.
        first: id of the tile's first column.
        softcap: applied to the logits first; None where that is done or there is none.
        temperature: [R] fp32.
        key: of every row's race, see ``sample.class_keys``.
        class_of: [n] int32, of the tile's ids.
    """
    logits = logits.float()
    if softcap is not None:
        logits = (logits / softcap).tanh_().mul_(softcap)
    index = class_of.long().expand(logits.shape)
    column = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    ids = column + first

    def largest(standing: Tensor, values: Tensor) -> Tensor:
        return standing.scatter_reduce(1, index, values, "amax")

    def first_at(values: Tensor, maximum: Tensor) -> Tensor:
        """[R, C] int32, the lowest id that has its class's maximum."""
        holds = torch.where(values == maximum, ids, _NO_ID)
        nobody = torch.full_like(running.argmax, _NO_ID)
        return nobody.scatter_reduce_(1, index, holds, "amin")

    best = largest(running.best, logits)
    risen = best > running.best
    top = best.gather(1, index)
    shift = (running.best - best) / temperature[:, None]
    shrink = shift.exp()
    running.argmax = torch.where(risen, first_at(logits, top), running.argmax)
    beaten = torch.where(risen, running.best, _MASKED)
    winner = torch.where(risen, running.argmax, -1).gather(1, index)
    others = logits.masked_fill(ids == winner, _MASKED)
    running.second = largest(torch.maximum(running.second, beaten), others)
    running.best = best

    scaled = (logits - top).div_(temperature[:, None])
    weight = scaled.exp()

    def total(values: Tensor) -> Tensor:
        """[R, C] fp32: in fp64, for thousands may be added one after the other."""
        sums = torch.zeros_like(running.mass, dtype=torch.float64)
        return sums.scatter_add_(1, index, values.double()).float()

    moment = shrink * (running.moment + shift * running.mass)
    running.moment = moment + total(weight * scaled)
    running.mass = shrink * running.mass + total(weight)

    standing = shrink * running.score
    scores = race(weight, key, ids)
    running.score = largest(standing, scores)
    leads = first_at(scores, running.score.gather(1, index))
    running.sample = torch.where(running.score > standing, leads, running.sample)


def of_pins(tokens: Tensor, classes: TokenClasses) -> ClassStats:
    """Of rows that have one id left, ``tokens`` [R] int64."""
    number = classes.of[tokens].long()[:, None]
    shape = len(tokens), classes.count

    def placed(nothing: float, dtype: torch.dtype, there: Tensor | float) -> Tensor:
        values = torch.full(shape, nothing, dtype=dtype, device=tokens.device)
        values.scatter_(1, number, there)
        values[:, 0] = nothing
        return values

    return ClassStats(
        log_mass=placed(-torch.inf, torch.float32, 0.0),
        entropy=torch.zeros(shape, device=tokens.device),
        best=placed(-1, torch.int64, tokens[:, None]),
        best_log_prob=placed(-torch.inf, torch.float32, 0.0),
        second_log_prob=torch.full(shape, -torch.inf, device=tokens.device),
        sample=placed(-1, torch.int64, tokens[:, None]),
    )
