"""What the model believes about the canvases of a step: the head, and what constrains it.

      hidden rows [B * L, H]
            |  head            where its statistics are read: not on commit rows, not beyond the
            |                  width of a canvas
            |  automata        a constrained canvas is conditioned on being accepted, all of its
            |                  rows at once (``constrain.automaton``)
            v
      CanvasStats [B, L]

The self-conditioning of a constrained canvas stays unconstrained: the model was trained that way,
and the head has it after one pass over the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.automaton.posterior import condition
from vllm_diffusion.constrain.automaton.rows import constrained
from vllm_diffusion.constrain.transfer import on_device
from vllm_diffusion.denoise.rng import Purpose, philox, uniform
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.constrain.automaton.slots import ConstrainedCanvases
    from vllm_diffusion.head import Head
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.records import CanvasBatch

# Memory for statistics by class. A class of a row takes at most 24 numbers. Canvases of one
# automaton that need more than the limit together are computed in turn.
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
        rows: all of them, canvas by canvas.
        num: B.
        read: [B, L] bool, rows whose statistics are read, see ``read_rows``; None for all.
        automata: which canvases an automaton constrains, each canvas at most once.
    """
    length = len(rows) // num
    if not automata:
        return _read(head, rows, read).reshape(num, length)
    constrained_canvases = {canvas for each in automata for canvas in each.places}
    stats = CanvasStats.zeros(rows.hidden, self_conditioning=rows.self_conditioning)
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
    """[K * length] int64, the rows of canvases [K] int64 among those of a batch."""
    offset = torch.arange(length, device=canvases.device)
    return (canvases[:, None] * length + offset).flatten()


def read_rows(pool: CanvasPool, batch: CanvasBatch) -> Tensor | None:
    """[B, L] bool, rows whose statistics are read; None on a device where asking would wait.

    Which rows these are is known on the device alone. A CPU can look; elsewhere all rows are
    computed.
    """
    if pool.device.type != "cpu":
        return None
    return batch.valid & ~pool.causal[batch.slots][:, None]


def _read(head: Head, rows: Rows, read: Tensor | None) -> CanvasStats:
    """Run the head on the rows that are read; the others get zeros, or anything."""
    if read is None or read.all():
        return head(rows)
    index = read.flatten().nonzero()[:, 0]
    if not index.numel():
        return CanvasStats.zeros(rows.hidden, self_conditioning=rows.self_conditioning)
    return head(rows.take(index)).spread(index, len(rows))


def _in_turn(canvases: ConstrainedCanvases, length: int) -> Iterator[ConstrainedCanvases]:
    row = canvases.automaton.num_classes * _BYTES_A_CLASS
    at_once = max(1, _BYTES_AT_ONCE // (row * length))
    for first in range(0, len(canvases.places), at_once):
        yield canvases.take(slice(first, first + at_once))


def _constrained(head: Head, rows: Rows, canvases: ConstrainedCanvases) -> CanvasStats:
    """Statistics of the rows of K canvases given that their automaton accepts them."""
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
