"""The published rule of families with a mask token: reveal the surest positions, for good.

    temperature   1; a request's own multiplies it
    accept        open positions above a threshold, and at least the share of the schedule
    renoise       nothing: a position keeps its token, or its mask
    stop          no position is open; the last step reveals all that are left. Or an id that ends
                  the answer stands before all open positions
    commit        the tokens, up to the first end

A position is open as long as the pool holds a mask there. So text that a canvas begins with stays.

Source: ``block_diffusion_generate`` of SDAR (arXiv 2510.06303), ``generate`` of LLaDA
(arXiv 2502.09992), and the threshold of Fast-dLLM (arXiv 2505.22618).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_diffusion.denoise.constants import RevealConstants
from vllm_diffusion.denoise.noise import AbsorbingNoise
from vllm_diffusion.denoise.reveal import revealed, scheduled
from vllm_diffusion.denoise.score import scores
from vllm_diffusion.denoise.stop import ended
from vllm_diffusion.family import Text
from vllm_diffusion.records import CanvasBatch, CanvasStats, Commit, Decision, StopReason
from vllm_diffusion.rules.rule import Rule

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.denoise.constants import RuleConstants
    from vllm_diffusion.denoise.noise import CanvasNoise
    from vllm_diffusion.family import Family


class Reveal(Rule):
    """The definition in torch, used on CPUs."""

    def __init__(self, noise: CanvasNoise, *, block: int | None = None) -> None:
        """Make the rule.

        Args:
            noise: of the family; absorbing.
            block: positions of a block, if canvases lie on a grid, see ``reveal.scheduled``.
        """
        super().__init__(noise)
        assert isinstance(noise, AbsorbingNoise), "only masks can be revealed"
        self.mask_id, self.block = noise.mask_id, block

    @classmethod
    def of(cls, family: Family, noise: CanvasNoise) -> Self:
        """See ``Rule.of``."""
        return cls(noise, block=family.block if family.text is Text.BLOCK else None)

    @property
    def not_a_mask(self) -> int:
        """What a position says whose token comes out as the mask.

        The mask is among the ids that a family bans, so this takes logits that are not numbers.
        """
        return 1 if self.mask_id == 0 else 0

    def temperature(self, pool: CanvasPool, slots: Tensor) -> Tensor:
        """1."""
        return torch.ones(len(slots), device=pool.device)

    def probabilities(self, pool: CanvasPool) -> tuple[bool, bool]:
        """See ``Rule.probabilities``."""
        asked = asked_of(pool)
        return "drawn" in asked, "model" in asked

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        """Reveal, stop."""
        slots, of = batch.slots, pool.constants
        tokens, step = pool.tokens[slots], pool.step[slots]
        is_open = (tokens == self.mask_id) & batch.valid
        least = scheduled(step, of.max_steps[slots], is_open.sum(dim=1), self.block)
        score = scores(
            of.reveal_by[slots], asked_of(pool), stats, pool.seed[slots], batch.position, step
        )
        accept = revealed(score, is_open, of.reveal_threshold[slots], least)
        said = stats.sample.masked_fill(stats.sample == self.mask_id, self.not_a_mask)
        next_tokens = torch.where(accept, said, tokens)
        assert pool.ends is not None
        upto = ended(next_tokens, pool.ends[slots], self.mask_id, batch.valid)
        return Decision(
            accept=accept,
            next_tokens=next_tokens,
            finished=(accept == is_open).all(dim=1) | (upto > 0),
            reason=torch.where(pool.out_of_steps(slots), StopReason.STEPS, StopReason.SETTLED),
            commit=Commit(tokens=next_tokens, count=torch.where(upto > 0, upto, batch.width)),
        )


def asked_of(pool: CanvasPool) -> tuple[str, ...]:
    """The scores that some request in the pool is ranked by, in the order of their first."""
    return tuple(dict.fromkeys(_by(constants) for constants in pool.owners.values()))


def _by(constants: RuleConstants) -> str:
    assert isinstance(constants, RevealConstants)
    return constants.reveal_by
