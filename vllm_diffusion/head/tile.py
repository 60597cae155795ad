"""Running statistics over the tiles of the vocabulary, and how one more tile is added.

Weights are exp((logit - top) / T) with the largest logit so far as ``top``, and what was summed
before shrinks when it rises. A softcap c would allow the constant c instead, but exp((x - c) / T)
underflows in fp32 once (c - x) / T passes 87: at c = 30 and T = 0.4 a row whose best logit is below
-4.8 would lose everything. The running maximum is needed for the argmax anyway, rescaling costs
1 / TILE of a tile's products, and any temperature and any rewritten logit are then safe: the
largest weight is 1, and a weight that underflows is below 1e-38 of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from vllm_diffusion.head.sample import bin_size, invert, padded_width, tile_scores
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.vocabulary import Vocabulary

# Finite stand-ins for -inf, whose difference is nan: a masked logit stays below any running top.
_LOWEST: Final = -1e30
_MASKED: Final = -3e30


@dataclass(slots=True, kw_only=True)
class RunningStats:
    """Statistics of R rows over the ids so far; changed in place, tile by tile."""

    top: Tensor  # [R] fp32, largest logit
    second: Tensor  # [R] fp32, the next one
    mass: Tensor  # [R] fp32, sum of w = exp(s), s = (logit - top) / T
    moment: Tensor  # [R] fp32, sum of w * s
    score: Tensor  # [R] fp32, best Gumbel score of a tile, its mass counted against top
    argmax: Tensor  # [R] int64
    sample: Tensor  # [R] int64, the draw inside that tile

    @staticmethod
    def initial(rows: int, device: torch.device) -> RunningStats:
        """Before the first tile."""

        def numbers(value: float) -> Tensor:
            return torch.full((rows,), value, device=device)

        return RunningStats(
            top=numbers(_LOWEST),
            second=numbers(_MASKED),
            mass=numbers(0.0),
            moment=numbers(0.0),
            score=numbers(-torch.inf),
            argmax=torch.zeros(rows, dtype=torch.int64, device=device),
            sample=torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def over_ranks(
        self, temperature: Tensor, vocabulary: Vocabulary
    ) -> tuple[RunningStats, Tensor]:
        """The statistics over all ranks, equal on every rank.

        Args:
            temperature: [R] fp32.
            vocabulary: knows the other ranks.

        Returns:
            The statistics, and by how much what this rank has summed shrinks, [R] fp32.
        """
        # fp32 holds ids below 2**24 exactly, and every communicator takes it: one exchange.
        ids = self.argmax.float(), self.sample.float()
        mine = [self.top, self.second, self.mass, self.moment, self.score, *ids]
        top, second, mass, moment, score, argmax, sample = vocabulary.gather(
            torch.stack(mine)
        ).unbind(1)
        best = top.amax(dim=0)
        shift = (top - best) / temperature
        shrink = shift.exp()
        drawn = (score + shift).argmax(dim=0, keepdim=True)
        together = RunningStats(
            top=best,
            second=torch.cat([top, second]).topk(2, dim=0).values[1],
            mass=(shrink * mass).sum(dim=0),
            moment=(shrink * (moment + shift * mass)).sum(dim=0),
            score=(score + shift).amax(dim=0),
            # Of equal ranks the first holds the lower ids.
            argmax=argmax.gather(0, top.argmax(dim=0, keepdim=True))[0].long(),
            sample=sample.gather(0, drawn)[0].long(),
        )
        return together, ((self.top - best) / temperature).exp()

    def statistics(self, temperature: Tensor, soft_embedding: Tensor | None) -> CanvasStats:
        """The statistics after the last tile, over all ranks.

        Args:
            temperature: [R] fp32.
            soft_embedding: [R, H], or None.
        """
        beside = ((self.second - self.top) / temperature).exp()
        return CanvasStats(
            argmax=self.argmax,
            sample=self.sample,
            entropy=self.mass.log() - self.moment / self.mass,
            top_prob=1 / self.mass,
            margin=(1 - beside) / self.mass,
            soft_embedding=soft_embedding,
        )


def absorb(
    running: RunningStats,
    logits: Tensor,
    *,
    first: int,
    softcap: float | None,
    temperature: Tensor,
    uniforms: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Add one tile.

    Args:
        running: of the tiles before; changed.
        logits: [R, n] fp32, or a dtype that converts to fp32; overwritten.
        first: id of the tile's first column.
        softcap: applied to the logits first; None where that is done or there is none.
        temperature: [R] fp32.
        uniforms: two of [R] fp32, the tile's, see ``sample.tile_uniforms``.

    Returns:
        [R, n] fp32 weights, and [R] fp32, by how much the sums over earlier tiles shrink.
    """
    width, logits = logits.shape[1], logits.float()
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    if missing := padded_width(width) - width:
        logits = functional.pad(logits, (0, missing), value=_MASKED)
    bins = logits.view(len(logits), -1, bin_size())
    place, top, second = _two_best(bins)
    new_top = torch.maximum(running.top, top)
    shift = (running.top - new_top) / temperature
    shrink = shift.exp()

    logits.sub_(new_top[:, None]).div_(temperature[:, None])
    weight = logits.exp()
    bins = weight.view(len(weight), -1, bin_size())
    bin_mass = bins.sum(dim=-1)
    mass = bin_mass.sum(dim=-1)
    gumbel, inside = uniforms
    score = tile_scores(mass, gumbel)
    drawn = score > running.score + shift
    sample = first + invert(bins, bin_mass, inside)

    running.argmax = torch.where(top > running.top, first + place, running.argmax)
    running.second = torch.maximum(
        torch.minimum(running.top, top), torch.maximum(running.second, second)
    )
    running.moment = shrink * (running.moment + shift * running.mass) + torch.linalg.vecdot(
        weight, logits
    )
    running.mass = shrink * running.mass + mass
    running.score = torch.where(drawn, score, running.score + shift)
    running.sample = torch.where(drawn, sample, running.sample)
    running.top = new_top
    return weight[:, :width], shrink


def without_infinities(logits: Tensor) -> Tensor:
    """Make masked logits finite, as ``absorb`` needs them, in place."""
    return logits.clamp_(min=_MASKED)


def _two_best(bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[R, N, size] -> place of the largest (the first of equals), its value, and the next value.

    Bin by bin, because a maximum over a whole row that also says where is many times as slow.
    """
    row = torch.arange(len(bins), device=bins.device)
    best = bins.amax(dim=-1)
    chosen = best.argmax(dim=-1)
    inside = bins[row, chosen]
    place = inside.argmax(dim=-1)
    top = inside[row, place]
    inside[row, place] = _MASKED
    best[row, chosen] = inside.amax(dim=-1)
    return chosen * bins.shape[-1] + place, top, best.amax(dim=-1)
