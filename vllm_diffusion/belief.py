"""Per-position statistics of a step's canvases: the head, then the automata that constrain them.

      hidden rows [B * L, H]
            |  head            skips commit rows and rows beyond a canvas's width, whose statistics
            |                  nobody reads, and rows whose token is known
            |  automata        condition all rows of a constrained canvas at once on being accepted
            |                  (``constrain.automaton``), and on the tokens that are known
            |  known rows      are certain of their token
            v
      CanvasStats [B, L]

Where noise is masks, a position that has its token keeps it, and what the model would say there was
never trained. Such a row is known, and no logits of it count.

The self-conditioning of a constrained canvas stays unconstrained: the model was trained that way,
and the head then needs only one pass over the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.automaton.posterior import condition
from vllm_diffusion.constrain.automaton.rows import constrained
from vllm_diffusion.constrain.transfer import on_device
from vllm_diffusion.denoise.rng import Purpose, philox, uniform
from vllm_diffusion.head.classes import pinned_class_stats
from vllm_diffusion.head.running_classes import TokenClasses

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.constrain.automaton.class_stats import ClassStats
    from vllm_diffusion.constrain.automaton.slots import ConstrainedCanvases
    from vllm_diffusion.head import Head
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.records import CanvasBatch, CanvasStats

# Memory limit for statistics by class. Each class of a row takes at most 24 fp32 numbers. Canvases
# of one automaton that exceed the limit together are computed in several parts.
_BYTES_AT_ONCE: Final = 2**28
_BYTES_A_CLASS: Final = 96


def beliefs(
    head: Head,
    rows: Rows,
    *,
    num: int,
    read: Tensor | None = None,
    known: Tensor | None = None,
    automata: Sequence[ConstrainedCanvases] = (),
) -> CanvasStats:
    """Statistics of all canvases of a step, [B, L].

    Args:
        head: turns rows into statistics.
        rows: [B * L], canvas by canvas.
        num: B.
        read: [B, L] bool, rows that the head is asked about, see ``read_rows``; None for all.
        known: [B, L] int64, see ``CanvasPool.known``.
        automata: the canvases that each automaton constrains; a canvas appears at most once.
    """
    length = len(rows) // num
    stats = _beliefs(head, rows, num, read, known, automata)
    if known is not None:
        stats = certain(stats, known.flatten())
    return stats.reshape(num, length)


def _beliefs(  # noqa: PLR0917 - the arguments of ``beliefs``
    head: Head,
    rows: Rows,
    num: int,
    read: Tensor | None,
    known: Tensor | None,
    automata: Sequence[ConstrainedCanvases],
) -> CanvasStats:
    """The same, [B * L], where the rows that are known may hold anything."""
    length = len(rows) // num
    if not automata:
        return _read(head, rows, read)
    constrained_canvases = {canvas for each in automata for canvas in each.places}
    stats = rows.unread()
    if others := [canvas for canvas in range(num) if canvas not in constrained_canvases]:
        free = on_device(others, rows.hidden.device)
        index = rows_of(free, length)
        free_read = None if read is None else read[free]
        stats = stats.replaced(index, _read(head, rows.take(index), free_read))
    for each in automata:
        for part in _in_turn(each, length):
            index = rows_of(part.canvas, length)
            its_known = None if known is None else known[part.canvas].flatten()
            its_read = None if known is None or read is None else read[part.canvas].flatten()
            its_rows = rows.take(index)
            its_stats = _constrained(head, its_rows, part, read=its_read, known=its_known)
            stats = stats.replaced(index, its_stats)
    return stats


def certain(stats: CanvasStats, known: Tensor) -> CanvasStats:
    """The statistics with rows that are certain of a token, ``known`` [R] int64, -1 for none."""
    is_known = known >= 0

    def put(values: Tensor | None, value: Tensor | float) -> Tensor | None:
        return None if values is None else torch.where(is_known, value, values)

    return replace(
        stats,
        argmax=torch.where(is_known, known, stats.argmax),
        sample=torch.where(is_known, known, stats.sample),
        entropy=stats.entropy.masked_fill(is_known, 0.0),
        top_prob=stats.top_prob.masked_fill(is_known, 1.0),
        margin=stats.margin.masked_fill(is_known, 1.0),
        sample_prob=put(stats.sample_prob, 1.0),
        own_prob=put(stats.own_prob, 1.0),
    )


def rows_of(canvases: Tensor, length: int) -> Tensor:
    """[K * length] int64, indices of the rows of canvases [K] int64 in the batch."""
    offset = torch.arange(length, device=canvases.device)
    return (canvases[:, None] * length + offset).flatten()


def read_rows(pool: CanvasPool, batch: CanvasBatch, known: Tensor | None = None) -> Tensor | None:
    """[B, L] bool, rows that the head is asked about; None where finding out needs a device sync.

    Only the device knows which rows these are. On a CPU they can be selected; on other devices all
    rows are computed.

    Args:
        pool, batch: as for ``step.advance``.
        known: [B, L] int64, see ``CanvasPool.known``.
    """
    if pool.device.type != "cpu":
        return None
    read = batch.valid & ~pool.causal[batch.slots][:, None]
    return read if known is None else read & (known < 0)


def _read(head: Head, rows: Rows, read: Tensor | None) -> CanvasStats:
    """Run the head on the rows that are read; the values of the others are undefined."""
    if read is None or read.all():
        return head(rows)
    index = read.flatten().nonzero()[:, 0]
    if not index.numel():
        return rows.unread()
    return head(rows.take(index)).spread(index, len(rows))


def _in_turn(canvases: ConstrainedCanvases, length: int) -> Iterator[ConstrainedCanvases]:
    row = canvases.automaton.num_classes * _BYTES_A_CLASS
    at_once = max(1, _BYTES_AT_ONCE // (row * length))
    for first in range(0, len(canvases.places), at_once):
        yield canvases.take(slice(first, first + at_once))


def _constrained(
    head: Head,
    rows: Rows,
    canvases: ConstrainedCanvases,
    *,
    read: Tensor | None,
    known: Tensor | None,
) -> CanvasStats:
    """Statistics of the rows of K canvases, conditioned on their automaton accepting them.

    Args:
        head: turns rows into statistics.
        rows: [K * L].
        canvases: and their automaton.
        read: [K * L] bool, rows that the head is asked about; None for all.
        known: [K * L] int64, tokens that stay, -1 for none; None where none does.
    """
    automaton, num = canvases.automaton, len(canvases.places)
    own, classes = _by_class(head, rows, canvases, read)
    if known is not None:
        own, classes = certain(own, known), _certain_classes(classes, known, canvases)
    word, *_ = philox(rows.noise.seed, rows.noise.position, rows.noise.step, Purpose.PATH)
    posterior = condition(
        classes.log_mass.reshape(num, -1, automaton.num_classes),
        classes.best_log_prob.reshape(num, -1, automaton.num_classes),
        own.top_prob.log().reshape(num, -1),
        edges=automaton.edges,
        start=canvases.start,
        rows=canvases.rows,
        left=canvases.left,
        uniforms=uniform(word).reshape(num, -1),
    )
    if known is None:
        return constrained(own, classes, posterior, automaton.class_of)
    rewrite = rows.rewrite
    greedy = None if rewrite is None or rewrite.greedy is None else rewrite.greedy[rewrite.canvas]
    stats = constrained(own, classes, posterior, automaton.class_of, keeps_best=greedy)
    if stats.own_prob is None:
        return stats
    asked = torch.arange(len(rows), device=known.device) if read is None else read.nonzero()[:, 0]
    scores = head.scores(rows.hidden[asked], stats.sample[asked], count=0)
    own_prob = stats.own_prob.index_copy(0, asked, scores.values[:, 0].exp())
    return replace(stats, own_prob=own_prob)


def _by_class(
    head: Head, rows: Rows, canvases: ConstrainedCanvases, read: Tensor | None
) -> tuple[CanvasStats, ClassStats]:
    """Run the head on the rows that it is asked about; the values of the others are undefined."""
    automaton = canvases.automaton
    if read is None:
        return head.by_class(rows, class_of=automaton.class_of, num_classes=automaton.num_classes)
    index = read.nonzero()[:, 0]
    if not index.numel():
        tokens = rows.noise.position.new_zeros(len(rows))
        of = TokenClasses(of=automaton.class_of, count=automaton.num_classes)
        return rows.unread(), pinned_class_stats(tokens, of, sample_prob=rows.sample_prob)
    own, classes = head.by_class(
        rows.take(index), class_of=automaton.class_of, num_classes=automaton.num_classes
    )
    return own.spread(index, len(rows)), classes.spread(index, len(rows))


def _certain_classes(
    classes: ClassStats, known: Tensor, canvases: ConstrainedCanvases
) -> ClassStats:
    """Statistics by class with rows that are certain of a token, as in ``certain``."""
    of = TokenClasses(of=canvases.automaton.class_of, count=canvases.automaton.num_classes)
    sample_prob = classes.sample_log_prob is not None
    pinned = pinned_class_stats(known.clamp(min=0), of, sample_prob=sample_prob)
    is_known = known[:, None] >= 0
    return classes.combine(pinned, lambda own, pin: torch.where(is_known, pin, own))
