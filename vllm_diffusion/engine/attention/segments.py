"""Attention masks: the rows of one forward as segments, each with one visibility rule.

    causal   prompt and commit rows: everything up to themselves, clipped by the layer's window
    span     an image's rows: as causal rows, and the whole image
    canvas   denoising rows: the whole prefix and the whole canvas; on a layer with window W every
             row sees the same prefix, its last W - 1 positions, and the whole canvas. Text on a
             grid, and text that sees all of itself, is made of these too

A segment is a separate attention sequence over its request's block table, so a request may have
several: text, image, text; or a finished canvas's commit rows and the next canvas. Every layer
writes the keys of all rows before any row attends, so a segment sees those before it. Backends that
take only whole requests get the same visibility as ranges (``attention.gpu``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from vllm.platforms import current_platform

if TYPE_CHECKING:
    from collections.abc import Sequence


class Visibility(Enum):
    """Which keys the rows of a segment see."""

    CAUSAL = auto()
    SPAN = auto()
    CANVAS = auto()


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of one request under one rule."""

    request: int
    """Index in the batch."""
    start: int
    """First row, in the rows of the batch."""
    length: int
    """Number of rows."""
    end: int
    """Absolute position after the last row, which is also the end of the visible keys."""
    visibility: Visibility
    span_start: int = 0
    """Absolute first position of the image that a SPAN lies in; rows before it may be cached."""


def plan_segments(
    query_start: Sequence[int],
    seq_lens: Sequence[int],
    canvas: Sequence[int],
    spans: Sequence[Sequence[tuple[int, int]]],
    padding: Sequence[int] | None = None,
) -> list[Segment]:
    """Cut every request's rows into segments, in row order.

    Args:
        query_start: N + 1 row offsets.
        seq_lens: N sequence lengths, including the rows of this step.
        canvas: N counts of canvas rows, the last rows of each request.
        spans: for each request the half-open absolute ranges that attend bidirectionally, ascending
            and disjoint; ranges outside the rows of this step are ignored.
        padding: N counts of unused rows after the canvas; None for none.
    """
    segments = []
    for request, last in enumerate(seq_lens):
        row, stop = query_start[request], query_start[request + 1]
        end = last - padding[request] if padding else last
        position, text_end = last - (stop - row), end - canvas[request]

        def add(
            upto: int, visibility: Visibility, span_start: int = 0, request: int = request
        ) -> None:
            nonlocal row, position
            if upto > position:
                length = upto - position
                segments.append(Segment(request, row, length, upto, visibility, span_start))
                row, position = row + length, upto

        for first, behind in spans[request]:
            if behind <= position or first >= text_end:
                continue
            add(first, Visibility.CAUSAL)
            add(min(behind, text_end), Visibility.SPAN, first)
        add(text_end, Visibility.CAUSAL)
        add(end, Visibility.CANVAS)
        add(last, Visibility.CAUSAL)
    return segments


def plan_blocks(
    query_start: Sequence[int], seq_lens: Sequence[int], block: int | None
) -> list[Segment]:
    """Cut every request's rows at the points of a grid: a row sees its block and all before it.

    Text and canvas rows are alike, so a block may hold some of both.

    Args:
        query_start, seq_lens: as for ``plan_segments``.
        block: positions from one point of the grid to the next; None for no grid: all rows of a
            request see each other.
    """
    segments = []
    for request, last in enumerate(seq_lens):
        row, stop = query_start[request], query_start[request + 1]
        position = last - (stop - row)
        while position < last:
            end = last if block is None else min(last, position - position % block + block)
            segments.append(Segment(request, row, end - position, end, Visibility.CANVAS))
            row, position = row + end - position, end
    return segments


def use_canvas_attention() -> None:
    """Make attention layers built from now on in this process support canvases.

    Only CPU_ATTN needs a class of ours. For batches without segments it behaves like vLLM's own, so
    other models in the same process are not affected.
    """
    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(
        AttentionBackendEnum.CPU_ATTN,
        "vllm_diffusion.engine.attention.cpu.CanvasCPUAttentionBackend",
    )
