"""What each sequence of a step shows to its rows, in plain torch: the definition.

On a GPU ``attention.kernels`` does the same in one launch each, and is chosen by ``form_for``.
Nothing here waits for the device, and everything is written into tensors of the caller's, which
captured graphs read.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from torch import Tensor

NO_RANGE = -1
"""FlashAttention's mark for a row in no range."""


def form_for(device: torch.device) -> Any:
    """The module whose functions of these names are for a device: this one, or its kernels."""
    kernels = "vllm_diffusion.engine.attention.kernels"
    return import_module(kernels if device.type == "cuda" else __name__)


def mark_sequences(
    phase: Tensor, slots: Tensor, causal: Tensor, *, text: Tensor | None = None
) -> None:
    """Write which sequences are causal, one sequence a request.

    Args:
        phase: [slots] bool, the next rows of a slot are causal.
        slots: [R] int64, the slot of each request.
        causal: [N] int32, written: 1 for causal ones; N - R sequences of padding behind get 0.
        text: [R] int32, 1 where the rows are text whatever the slot's phase; None for nowhere.
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
    """Write which sequences are causal and where each ends, where a request is several.

    Args:
        phase, slots: as in ``mark_sequences``.
        lens: [R] int32, positions behind each request's last row.
        request: [P] int32, the request a sequence belongs to.
        behind: [P] int32, rows of the request behind the sequence's.
        text: [P] int32, as there; -1 where they are none whatever the phase.
        causal: [P] int32, written.
        part_lens: [P] int32, written: positions behind each sequence's last row.
    """
    causal.copy_((text | phase[slots[request]].int()) > 0)
    part_lens.copy_(lens[request] - behind)


def write_sequence_ranges(
    causal: Tensor, starts: Tensor, lens: Tensor, window: int, ranges: Tensor
) -> None:
    """Write what a canvas sees on a layer with this window; a causal sequence has no range.

    Args:
        causal: [N] int32, 0 for canvases.
        starts: [N + 1] int32, the first row of each sequence.
        lens: [N] int32, positions behind each sequence's last row.
        window: W, in tokens.
        ranges: [N, 1, 2] int32, written: first and last key; a pair that does not ascend is none.
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
    """Write what every row sees, from the first block on that any row of its sequence sees.

    Args:
        causal, starts, lens, window: as in ``write_sequence_ranges``.
        block: keys a block of the cache.
        longest: most rows of a sequence; the kernel's grid.
        ranges: [T, 2] int32, written: first and last key; ``NO_RANGE`` for rows of causal
            sequences and behind all sequences.
        view_lens: [N] int32, written: length without the blocks that are skipped.
        first_blocks: [N] int32, written: how many are.
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
    """Write rows of block tables from their first block on; beyond its end the last is repeated.

    Args:
        tables: each [R, blocks] int32, all of one shape and stride.
        out: each [N, width] int32, written, all of one shape and stride.
        rows: [N] int32, which row; its own number if None.
        first: [N] int32, its first block; 0 if None.
    """
    for table, view in zip(tables, out, strict=True):
        column = torch.arange(view.shape[1], device=view.device)[None]
        if first is not None:
            column = column + first[:, None]
        taken = table[: view.shape[0]] if rows is None else table[rows]
        column = column.clamp(max=table.shape[1] - 1).expand(view.shape[0], -1)
        view.copy_(taken.gather(1, column))


def of_one_shape(tables: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    """Block tables and what is cut of them, those together that ``gather_blocks`` takes at once."""
    alike: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
    for table, view in tables:
        alike.setdefault((table.shape, table.stride(), view.shape), []).append((table, view))
    return list(alike.values())


def sequence_of_rows(starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """[T] int64 the sequence of each row, and [T] bool which rows lie behind all sequences."""
    row = torch.arange(tokens, device=starts.device, dtype=starts.dtype)
    sequence = torch.searchsorted(starts[1:], row, right=True)
    last = starts.shape[0] - 2
    return sequence.clamp(max=last), sequence > last


def first_seen(starts: Tensor, lens: Tensor, window: int | None) -> Tensor:
    """[N] int32 leftmost key that the window shows to any row, also of a causal sequence."""
    prefix = lens - (starts[1:] - starts[:-1])
    return torch.zeros_like(prefix) if window is None else (prefix - window + 1).clamp_(min=0)
