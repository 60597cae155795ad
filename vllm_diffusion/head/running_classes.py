"""Running statistics by class of tokens over the tiles of the vocabulary.

Every class has a reference of its own, its largest logit so far: a class is measured as exactly
where the row's best token is a thousand nats above it as where that token is its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.automaton.class_stats import ClassStats

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.tile import RunningStats
    from vllm_diffusion.head.vocabulary import Vocabulary

# Finite stand-ins for -inf, as in ``tile``: no token of the class so far.
LOWEST: Final = -1e30
MASKED: Final = -3e30

NO_ID: Final = torch.iinfo(torch.int32).max
"""Above every id."""

RECORD: Final = 8
"""Words of a class in a row, one of them unused: vd_running_class of class_pass.h."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenClasses:
    """Which class every token belongs to, see ``Head.by_class``."""

    of: Tensor  # [V] int32
    count: int

    def lowest(self, vocabulary: Vocabulary) -> Tensor:
        """[C] int32, the lowest id of every class on this rank, -1 for none and for class 0."""
        mine = self.of[vocabulary.first : vocabulary.first + len(vocabulary)].long()
        ids = torch.arange(len(mine), dtype=torch.int32, device=mine.device) + vocabulary.first
        lowest = torch.full((self.count,), NO_ID, dtype=torch.int32, device=mine.device)
        lowest.scatter_reduce_(0, mine, ids, "amin")
        lowest[:1].fill_(NO_ID)
        return lowest.masked_fill_(lowest == NO_ID, -1)


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
    def initial(rows: int, classes: TokenClasses, vocabulary: Vocabulary) -> RunningClasses:
        """Before the first tile."""
        lowest = classes.lowest(vocabulary)
        # Side by side, as the C++ form reads them.
        values = torch.zeros(rows, classes.count, RECORD, device=lowest.device)
        ids = values.view(torch.int32)
        values[..., 0], values[..., 1] = LOWEST, MASKED
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
        """The statistics over all ranks, equal on every rank; see ``RunningStats.over_ranks``."""
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
        """The statistics after the last tile.

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
        alone = nobody | (self.second <= LOWEST)
        return ClassStats(
            log_mass=(best + mass).masked_fill_(nobody, -torch.inf),
            entropy=(mass - self.moment / self.mass).masked_fill_(nobody, 0.0),
            best=self.argmax.long().masked_fill_(nobody, -1),
            best_log_prob=best.masked_fill_(nobody, -torch.inf),
            second_log_prob=share(self.second).masked_fill_(alone, -torch.inf),
            sample=self.sample.long().masked_fill_(nobody, -1),
        )
