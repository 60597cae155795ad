"""Which way every row of a step is computed, from its own request and nothing else.

A row's arithmetic must not depend on its neighbours. Ways that differ in the last bit would draw
another token in a batch than alone, once in a long while.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.transfer import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Rewrite, Truncation, Wish

LISTED_AT_MOST: Final = 4096
"""A longer list is treated as a mask: its columns of the embedding would have to be copied."""

PLAIN: Final = -1
"""Its logits are not rewritten."""
REWRITTEN: Final = -2
CUT: Final = -3
PINNED: Final = -4
MASKED: Final = -5
"""For statistics by class only, which treat all masks alike. From 0 on: the canvas of a list."""


def groups(kind_of: Tensor) -> list[tuple[int, Tensor]]:
    """Every kind in the batch and its rows [N] int64; waits for the device once.

    Args:
        kind_of: [R] int64.
    """
    if kind_of.device.type == "cpu":
        kinds = torch.unique(kind_of).tolist()
        return [(kind, (kind_of == kind).nonzero()[:, 0]) for kind in kinds]
    rows: dict[int, list[int]] = {}
    for row, kind in enumerate(kind_of.tolist()):
        rows.setdefault(kind, []).append(row)
    return [(kind, on_device(some, kind_of.device)) for kind, some in sorted(rows.items())]


def by_request(wishes: Sequence[Wish], rows: int) -> list[tuple[int, list[int]]]:
    """Every kind, judged by the requests, and its rows; without waiting for the device.

    ``by_row`` looks at what rows hold; this assumes what they may hold. A row counts as rewritten
    even if ids are forbidden only in other rows of its canvas. Pins are ignored.

    Args:
        wishes: one for each canvas.
        rows: of all canvases together, the same number each, canvas by canvas.
    """
    length = rows // len(wishes)
    found: dict[int, list[int]] = {}
    for canvas, wish in enumerate(wishes):
        kind = CUT if wish.cuts else REWRITTEN if wish.moves or wish.allowed is not None else PLAIN
        if wish.allowed is not None and len(wish.allowed) <= LISTED_AT_MOST:
            kind = canvas
        found.setdefault(kind, []).extend(range(canvas * length, (canvas + 1) * length))
    return sorted(found.items())


def by_row(rewrite: Rewrite, vocab: int) -> Tensor:
    """[R] int64, the kind of every row."""
    found = torch.where(_rewritten(rewrite), REWRITTEN, PLAIN)
    if rewrite.truncation is not None:
        found = torch.where(cuts(rewrite.truncation, vocab)[rewrite.canvas], CUT, found)
    if rewrite.allowed is not None:
        listed = (rewrite.allowed >= 0).sum(dim=1)[rewrite.canvas]
        found = torch.where((listed > 0) & (found == PLAIN), REWRITTEN, found)
        short = (listed > 0) & (listed <= LISTED_AT_MOST)
        found = torch.where(short, rewrite.canvas, found)
    if rewrite.pinned is not None:
        found = torch.where(rewrite.pinned >= 0, PINNED, found)
    return found


def by_row_for_classes(rewrite: Rewrite, vocab: int) -> Tensor:
    """[R] int64, the kind of every row for statistics by class."""
    changed, masked = _rewritten(rewrite), torch.zeros_like(rewrite.canvas, dtype=torch.bool)
    if rewrite.greedy is not None:
        changed |= rewrite.greedy[rewrite.canvas]  # their samples are of another kind
    if rewrite.truncation is not None:
        masked |= cuts(rewrite.truncation, vocab)[rewrite.canvas]
    if rewrite.allowed is not None:
        masked |= (rewrite.allowed >= 0).any(dim=1)[rewrite.canvas]
    if rewrite.forbidden is not None:
        masked |= (rewrite.forbidden >= 0).any(dim=1)
    found = torch.where(masked, MASKED, torch.where(changed, REWRITTEN, PLAIN))
    if rewrite.pinned is not None:
        found = torch.where(rewrite.pinned >= 0, PINNED, found)
    return found


def cuts(asked: Truncation, vocab: int) -> Tensor:
    """[B] bool, canvases whose distribution is truncated."""
    return (asked.min_p > 0) | (asked.top_k < vocab) | (asked.top_p < 1)


def _rewritten(rewrite: Rewrite) -> Tensor:
    """[R] bool, rows with biased, penalised or forbidden ids."""
    changed = torch.zeros_like(rewrite.canvas, dtype=torch.bool)
    if rewrite.bias is not None:
        changed |= (rewrite.bias[1] != 0).any(dim=1)[rewrite.canvas]
    if (cost := rewrite.penalties) is not None:
        costs = ((cost.scale != 1) | (cost.offset != 0)).any(dim=1)
        changed |= costs[rewrite.canvas]
    if rewrite.forbidden is not None:
        changed |= (rewrite.forbidden >= 0).any(dim=1)
    return changed
