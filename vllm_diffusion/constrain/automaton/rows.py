"""Statistics of rows under a constraint: those of the head, combined with the posterior.

In: ``CanvasStats`` and ``ClassStats`` of the same rows, their ``Posterior``. Out: ``CanvasStats``
of the marginal distributions, with the joint sample and the most likely canvas in them.

A constraint changes how likely a class is, never how likely its tokens are relative to each other.
So a row, constrained in some of its futures and ended in the others, is determined by the mass of
every class: the posterior's and, where it has ended, the model's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.automaton.class_stats import ClassStats
    from vllm_diffusion.constrain.automaton.record import Posterior
    from vllm_diffusion.records import CanvasStats


def constrained(
    stats: CanvasStats,
    classes: ClassStats,
    posterior: Posterior,
    class_of: Tensor,
    *,
    keeps_best: Tensor | None = None,
) -> CanvasStats:
    """Statistics of R = B * L rows given that their canvases are accepted.

    The argmax is the most likely canvas's token, not that of the marginal, so the margin may be
    negative. Free rows keep what they have; the soft embedding is the model's own everywhere.

    Args:
        stats: of the rows alone, [R].
        classes: of the same distributions, [R, C].
        posterior: of the canvases [B, L].
        class_of: [V] integer, class of every token id; 0: no state reads it.
        keeps_best: [R] bool, rows whose sample is that of the most likely canvas too, where samples
            stay: tokens of two canvases may not go together. None for no row.
    """
    num_classes = classes.log_mass.shape[1]
    marginal = posterior.marginal.reshape(-1, num_classes)
    ended = posterior.ended.flatten()
    mass = classes.log_mass.exp()
    share = marginal + ended[:, None] * mass  # of every class but 0
    argmax = _tokens_of(posterior.map_class, classes.best, stats.argmax)
    best, second = (
        share * (log_prob - classes.log_mass).exp().nan_to_num(0.0)
        for log_prob in (classes.best_log_prob, classes.second_log_prob)
    )
    mine = class_of[argmax].long()[:, None]
    # Tokens that no state reads stand in ended rows alone. No class knows the best of them: it is
    # the model's own best token, or its next one, or less likely than one of the others.
    own = ended * stats.top_prob
    unread = torch.where(argmax == stats.argmax, own - ended * stats.margin, own)
    top = torch.where(mine == 0, own[:, None], best.gather(1, mine))[:, 0]
    others = best.scatter(1, mine, second.gather(1, mine)).amax(dim=1)
    free = posterior.map_class.flatten() < 0
    free &= ended == 1
    top_prob = torch.where(free, stats.top_prob, top)
    sample = _tokens_of(posterior.sample_class, classes.sample, stats.sample)
    sample_prob = _prob_of_sample(sample, stats, classes, posterior, class_of)
    if keeps_best is not None:
        sample = torch.where(keeps_best, argmax, sample)
        if sample_prob is not None:
            sample_prob = torch.where(keeps_best, top_prob, sample_prob)
    return replace(
        stats,
        argmax=argmax,
        sample=sample,
        entropy=torch.where(free, stats.entropy, _entropy(stats, classes, mass, share, ended)),
        top_prob=top_prob,
        sample_prob=sample_prob,
        margin=torch.where(free, stats.margin, top - torch.maximum(others, unread)),
    )


def _tokens_of(chosen: Tensor, tokens: Tensor, own: Tensor) -> Tensor:
    """[R] the tokens [R, C] of the chosen classes; the row's own where no class is chosen."""
    index = chosen.reshape(-1, 1)
    return torch.where(index < 0, own[:, None], tokens.gather(1, index.clamp(min=0)))[:, 0]


def _prob_of_sample(
    sample: Tensor,
    stats: CanvasStats,
    classes: ClassStats,
    posterior: Posterior,
    class_of: Tensor,
) -> Tensor | None:
    """[R] fp32, the marginal probability of the sample; None where no rule asks."""
    if stats.sample_prob is None or classes.sample_log_prob is None:
        return None
    mine = class_of[sample].long()[:, None]
    # A row that the sample leaves free holds the model's own token, whatever its class drew.
    free = posterior.sample_class.flatten() < 0
    drawn = classes.sample_log_prob.gather(1, mine)[:, 0]
    log_prob = torch.where(free, stats.sample_prob.log(), drawn)
    marginal = posterior.marginal.flatten(0, 1).gather(1, mine)[:, 0]
    # In logs: a class may have next to no mass before it is the only one left.
    inside = (log_prob - classes.log_mass.gather(1, mine)[:, 0]).exp()
    inside = inside.nan_to_num(0.0, posinf=0.0)
    return marginal * inside + posterior.ended.flatten() * log_prob.exp()


def _entropy(
    stats: CanvasStats, classes: ClassStats, mass: Tensor, share: Tensor, ended: Tensor
) -> Tensor:
    """[R] nats: the sum of every class's part of -sum p log p; class 0 has the remainder."""

    def parts(of: Tensor) -> Tensor:
        return (of * classes.entropy - torch.xlogy(of, of)).sum(dim=1)

    unread = (1 - mass.sum(dim=1)).clamp(min=0.0)
    lacks = (stats.entropy - parts(mass)).clamp(min=0.0)
    return (parts(share) + ended * lacks - unread * torch.xlogy(ended, ended)).clamp(min=0.0)
