"""The keys that each sequence of a step shows to its rows, in plain torch (the definition).

``attention.kernels`` is the same for GPUs, one launch per function; ``form_for`` chooses. Nothing
here syncs with the device, and results are written into the caller's tensors, which captured graphs
read.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

NO_RANGE = -1
"""FlashAttention's marker for a row without a range."""


def form_for(device: torch.device) -> Any:
    """The module that implements these functions for a device: this one, or ``kernels``."""
    kernels = "vllm_diffusion.engine.attention.kernels"
    return import_module(kernels if device.type == "cuda" else __name__)


def mark_sequences(
    phase: Tensor, slots: Tensor, causal: Tensor, *, text: Tensor | None = None
) -> None:
    """Write which sequences are causal, if every request is one sequence.

    Args:
        phase: [slots] bool, the next rows of a slot are causal.
        slots: [R] int64, the slot of each request.
        causal: [N] int32, written: 1 for causal ones; the N - R padding sequences get 0.
        text: [R] int32, 1 for rows that are text whatever the slot's phase; None for none.
    """
    flags = phase[slots].int()
    causal.zero_()
    causal[: slots.shape[0]] = flags if text is None else text | flags


def mark_parts(
    phase: Tensor,
    slots: Tensor,
    lens: Tensor,
    request: Tensor,
    behind: Tensor,
    text: Tensor,
    causal: Tensor,
    part_lens: Tensor,
) -> None:
    """Write which sequences are causal and where each ends, if a request may be several.

    Args:
        phase, slots: as in ``mark_sequences``.
        lens: [R] int32, sequence length of each request.
        request: [P] int32, the request of each sequence.
        behind: [P] int32, rows of the request after those of the sequence.
        text: [P] int32, as in ``mark_sequences``; -1 for rows that are not text in any phase.
        causal: [P] int32, written.
        part_lens: [P] int32, written: the length of each sequence.
    """
    causal.copy_((text | phase[slots[request]].int()) > 0)
    part_lens.copy_(lens[request] - behind)


def write_sequence_ranges(
    causal: Tensor, starts: Tensor, lens: Tensor, window: int, ranges: Tensor
) -> None:
    """Write the range of keys that a canvas sees on a layer with this window.

    Args:
        causal: [N] int32, 0 for canvases.
        starts: [N + 1] int32, the first row of each sequence.
        lens: [N] int32, the length of each sequence.
        window: W, in tokens.
        ranges: [N, 1, 2] int32, written: first and last key; a pair that does not ascend for causal
            sequences, which have no range.
    """
    seen = torch.stack((first_seen(starts, lens, window), lens - 1), dim=1)
    ranges[:, 0] = torch.where((causal == 0)[:, None], seen, 0)


def write_row_ranges(
    causal: Tensor,
    starts: Tensor,
    lens: Tensor,
    window: int,
    block: int,
    longest: int,
    ranges: Tensor,
    view_lens: Tensor,
    first_blocks: Tensor,
) -> None:
    """Write the range of every row, relative to the first block that its sequence sees.

    Args:
        causal, starts, lens, window: as in ``write_sequence_ranges``.
        block: keys per block of the cache.
        longest: most rows of a sequence; sets the kernel's grid.
        ranges: [T, 2] int32, written: first and last key; ``NO_RANGE`` for rows of causal
            sequences and rows after all sequences.
        view_lens: [N] int32, written: length without the skipped blocks.
        first_blocks: [N] int32, written: number of skipped blocks.
    """
    del longest
    first = first_seen(starts, lens, window)
    torch.div(first, block, rounding_mode="floor", out=first_blocks)
    skipped = first_blocks * block
    torch.sub(lens, skipped, out=view_lens)
    sequence, padding = sequence_of_rows(starts, ranges.shape[0])
    seen = torch.stack((first - skipped, lens - 1 - skipped), dim=1)
    canvas_row = (causal == 0)[sequence] & ~padding
    ranges.copy_(torch.where(canvas_row[:, None], seen[sequence], NO_RANGE))


def gather_blocks(
    tables: Sequence[Tensor],
    out: Sequence[Tensor],
    *,
    rows: Tensor | None = None,
    first: Tensor | None = None,
) -> None:
    """Copy rows of block tables, each from its first block on; past the end the last is repeated.

    Args:
        tables: each [R, blocks] int32, all of one shape and stride.
        out: each [N, width] int32, written, all of one shape and stride.
        rows: [N] int32, row of the table; None for row n.
        first: [N] int32, first block to copy; None for 0.
    """
    for table, view in zip(tables, out, strict=True):
        column = torch.arange(view.shape[1], device=view.device)[None]
        if first is not None:
            column = column + first[:, None]
        taken = table[: view.shape[0]] if rows is None else table[rows]
        column = column.clamp(max=table.shape[1] - 1).expand(view.shape[0], -1)
        view.copy_(taken.gather(1, column))


def of_one_shape(tables: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Group pairs of block table and output by shape, one ``gather_blocks`` call per group."""
    alike: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
    for table, view in tables:
        alike.setdefault((table.shape, table.stride(), view.shape), []).append((table, view))
    return list(alike.values())


def sequence_of_rows(starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """[T] int64, the sequence of each row, and [T] bool, the rows after all sequences."""
    row = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts[1:], row, right=True)
    last = starts.shape[0] - 2
    return sequence.clamp(max=last), sequence > last


def first_seen(starts: Tensor, lens: Tensor, window: int | None) -> Tensor:
    """[N] int32, first key that the window shows to any row, for causal sequences too."""
    prefix = lens - (starts[1:] - starts[:-1])
    return torch.zeros_like(prefix) if window is None else (prefix - window + 1).clamp_(min=0)
