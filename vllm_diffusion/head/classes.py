"""Statistics of rows by class of tokens, over the tiles of the vocabulary seen so far.

The pass over a tile is here in torch, and in C++ for CPU hosts, see ``native_classes``. Column 0 of
``RunningClasses`` is a bin for tokens that nobody asks about.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.automaton.class_stats import ClassStats
from vllm_diffusion.head import native, native_classes
from vllm_diffusion.head.running_classes import MASKED, NO_ID, RunningClasses
from vllm_diffusion.head.sample import class_keys, race

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.native_classes import TileOrder
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.head.running_classes import TokenClasses
    from vllm_diffusion.head.tile import RunningStats
    from vllm_diffusion.head.vocabulary import Vocabulary

CLASS_BYTES: Final = 4 * 24
"""Bytes that a class of a row takes at most; measured by tests/unit/head/test_memory.py."""


class ClassPass:
    """Sees every tile before the row pass overwrites it.

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
        self._running = RunningClasses.initial(len(rows), classes, vocabulary)

    def see(self, logits: Tensor, first: int, softcap: float | None) -> None:
        """Add the logits [R, n] of the ids from ``first`` on, which stay unchanged."""
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
        """Statistics over all ranks, see ``RunningClasses.statistics``."""
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
    """Add one tile.

    Args:
        running: of the tiles before; changed.
        logits: [R, n] fp32, or a dtype that converts to fp32; none is -inf.
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
        holds = torch.where(values == maximum, ids, NO_ID)
        nobody = torch.full_like(running.argmax, NO_ID)
        return nobody.scatter_reduce_(1, index, holds, "amin")

    best = largest(running.best, logits)
    risen = best > running.best
    top = best.gather(1, index)
    shift = (running.best - best) / temperature[:, None]
    shrink = shift.exp()
    running.argmax = torch.where(risen, first_at(logits, top), running.argmax)
    beaten = torch.where(risen, running.best, MASKED)
    winner = torch.where(risen, running.argmax, -1).gather(1, index)
    others = logits.masked_fill(ids == winner, MASKED)
    running.second = largest(torch.maximum(running.second, beaten), others)
    running.best = best

    scaled = (logits - top).div_(temperature[:, None])
    weight = scaled.exp()

    def total(values: Tensor) -> Tensor:
        """[R, C] fp32, summed in fp64: thousands may be added one by one."""
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


def pinned_class_stats(
    tokens: Tensor, classes: TokenClasses, *, sample_prob: bool = False
) -> ClassStats:
    """Statistics by class of rows with one id left, ``tokens`` [R] int64."""
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
        sample_log_prob=placed(-torch.inf, torch.float32, 0.0) if sample_prob else None,
    )
