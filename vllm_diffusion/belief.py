"""Per-position statistics of a step's canvases: the head, then the automata that constrain them.

      hidden rows [B * L, H]
            |  head            skips commit rows and rows beyond a canvas's width, whose statistics
            |                  nobody reads
            |  automata        condition all rows of a constrained canvas at once on being accepted
            |                  (``constrain.automaton``)
            v
      CanvasStats [B, L]

The self-conditioning of a constrained canvas stays unconstrained: the model was trained that way,
and the head then needs only one pass over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.automaton.posterior import condition
from vllm_diffusion.constrain.automaton.rows import constrained
from vllm_diffusion.constrain.transfer import on_device
from vllm_diffusion.denoise.rng import Purpose, philox, uniform

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
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
    automata: Sequence[ConstrainedCanvases] = (),
) -> CanvasStats:
    """Statistics of all canvases of a step, [B, L].

    Args:
        head: turns rows into statistics.
        rows: [B * L], canvas by canvas.
        num: B.
        read: [B, L] bool, rows whose statistics are read, see ``read_rows``; None for all.
        automata: the canvases that each automaton constrains; a canvas appears at most once.
    """
    length = len(rows) // num
    if not automata:
        return _read(head, rows, read).reshape(num, length)
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
            stats = stats.replaced(index, _constrained(head, rows.take(index), part))
    return stats.reshape(num, length)


def rows_of(canvases: Tensor, length: int) -> Tensor:
    """[K * length] int64, indices of the rows of canvases [K] int64 in the batch."""
    offset = torch.arange(length, device=canvases.device)
    return (canvases[:, None] * length + offset).flatten()


def read_rows(pool: CanvasPool, batch: CanvasBatch) -> Tensor | None:
    """[B, L] bool, rows whose statistics are read; None where finding out needs a device sync.

    Only the device knows which rows these are. On a CPU they can be selected; on other devices all
    rows are computed.
    """
    if pool.device.type != "cpu":
        return None
    return batch.valid & ~pool.causal[batch.slots][:, None]


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


def _constrained(head: Head, rows: Rows, canvases: ConstrainedCanvases) -> CanvasStats:
    """Statistics of the rows of K canvases, conditioned on their automaton accepting them."""
    automaton, num = canvases.automaton, len(canvases.places)
    own, classes = head.by_class(
        rows, class_of=automaton.class_of, num_classes=automaton.num_classes
    )
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
    return constrained(own, classes, posterior, automaton.class_of)
