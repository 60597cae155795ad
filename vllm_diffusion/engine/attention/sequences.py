"""The rows of a forward as attention sequences for GPU backends, each causal or a canvas.

A request is one sequence, except if a finished canvas is committed beside its successor: then it is
two over the same block table, text rows and canvas rows. Every layer writes the keys of all rows
before any row attends, so the second sequence sees the first.

The host knows how many rows are text and how many are canvas. Only the device knows whether a
canvas's rows are being committed instead, and where a request ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_diffusion.engine.attention.ranges import form_for, of_one_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Sequences on the host, [P] int32 each, in row order."""

    request: np.ndarray
    """Request of each sequence."""
    rows: np.ndarray
    """Number of rows."""
    behind: np.ndarray
    """Number of rows of the request after them."""
    text: np.ndarray
    """1 for text rows, 0 for canvas rows that may be the commit of a finished canvas, -1 for canvas
    rows that may not."""


def parts_of(rows: np.ndarray, canvas: np.ndarray, *, foreseen: bool = False) -> Parts:
    """Split every request's rows into text rows and canvas rows after them.

    Args:
        rows: [R], rows of each request.
        canvas: [R], number of canvas rows, the last ones.
        foreseen: whether rows before the canvas rows may be the canvas itself, if its slot is not
            committing; the rows after them are then padding, see ``engine.fusion``.
    """
    both = np.stack((rows - canvas, canvas), axis=1).astype(np.int32)
    behind = np.stack((canvas, np.zeros_like(canvas)), axis=1).astype(np.int32)
    taken = both > 0
    request, kind = np.nonzero(taken)
    text = kind == 0
    if foreseen:
        text = np.where((rows > canvas)[request] & (canvas > 0)[request], -kind, text)
    return Parts(
        request=request.astype(np.int32),
        rows=both[taken],
        behind=behind[taken],
        text=text.astype(np.int32),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """A step's N sequences, as ``build_attn_metadata`` and ``BlockLocalMask`` read them."""

    starts: Tensor  # [N + 1] int32, first row of each
    starts_on_host: Tensor
    longest: int  # most rows of any
    lens: Tensor  # [N] int32, lengths
    lens_at_most: Tensor  # [N] int32, upper bounds of the lengths, on the host
    causal: Tensor  # [N] int32
    block_tables: tuple[Tensor, ...]  # one per cache group, [N, blocks] int32
    spans: list[list[tuple[int, int]]]  # images, see ``plan_segments``


def sequences_of(
    batch: Any,
    parts: Parts | None,
    *,
    count: int,
    phase: Tensor,
    causal: Tensor,
    block_tables: tuple[Tensor, ...],
    spans: Sequence[list[tuple[int, int]]],
) -> Sequences:
    """The sequences of a batch.

    If each is a whole request, every tensor is the runner's own, at the address that a captured
    graph reads; ``causal`` always is. A batch with more sequences is never a graph: all requests
    of a graph have as many rows as a canvas.

    Args:
        batch: the runner's ``InputBatch``.
        parts: how its requests are split; None if each is one sequence in its slot's phase.
        count: N if each request is one sequence, including padding sequences.
        phase: [slots] bool, the next rows of a slot are causal.
        causal: int32, its first N elements are written; twice as long as most requests.
        block_tables: one per cache group, [N, blocks] int32.
        spans: images of every request.
    """
    form = form_for(causal.device)
    if parts is not None and parts.request.shape[0] > len(spans):
        return _cut_requests(batch, parts, phase, causal, block_tables, spans)
    text = None if parts is None else async_tensor_h2d(parts.text, device=causal.device)
    form.mark_sequences(phase, batch.idx_mapping, causal[:count], text=text)
    return Sequences(
        starts=batch.query_start_loc[: count + 1],
        starts_on_host=torch.from_numpy(batch.query_start_loc_np[: count + 1]),
        longest=int(batch.num_scheduled_tokens.max()),
        lens=batch.seq_lens[:count],
        lens_at_most=batch.seq_lens_cpu_upper_bound[:count],
        causal=causal[:count],
        block_tables=block_tables,
        spans=list(spans),
    )


def _cut_requests(
    batch: Any,
    parts: Parts,
    phase: Tensor,
    causal: Tensor,
    block_tables: tuple[Tensor, ...],
    spans: Sequence[list[tuple[int, int]]],
) -> Sequences:
    count, device = parts.request.shape[0], causal.device
    form = form_for(device)
    starts = np.zeros(count + 1, np.int32)
    np.cumsum(parts.rows, out=starts[1:])
    # One asynchronous copy for all.
    sent = async_tensor_h2d(
        np.concatenate((starts, parts.request, parts.behind, parts.text)), device=device
    )
    starts_there, request, behind, text = sent.split([count + 1, count, count, count])
    lens = torch.empty(count, dtype=torch.int32, device=device)
    flags = causal[:count]
    form.mark_parts(phase, batch.idx_mapping, batch.seq_lens, request, behind, text, flags, lens)
    tables = [table.new_empty(count, table.shape[1]) for table in block_tables]
    for alike in of_one_shape(list(zip(block_tables, tables, strict=True))):
        form.gather_blocks(*zip(*alike, strict=True), rows=request)
    at_most = batch.seq_lens_cpu_upper_bound.numpy()[parts.request] - parts.behind
    return Sequences(
        starts=starts_there,
        starts_on_host=torch.from_numpy(starts),
        longest=int(parts.rows.max()),
        lens=lens,
        lens_at_most=torch.from_numpy(at_most),
        causal=flags,
        block_tables=tuple(tables),
        spans=[spans[index] for index in parts.request],
    )
