"""The rewrite of rows that are computed again under the mask of what a grammar allows there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.rewrite import Rewrite
from vllm_diffusion.constrain.transfer import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def under_mask(rewrite: Rewrite | None, rows: Tensor, masks: Sequence[Tensor]) -> Rewrite:
    """The rewrite of some rows of a batch, limited to the ids that a grammar allows.

    Args:
        rewrite: of the batch; None for nothing at all.
        rows: [N] int64, rows of the batch.
        masks: N times [V] bool, on the host. The ids that request and grammar both allow are left,
            or, if there are none, all that the grammar allows. Pins are dropped: the pin of a row
            that is computed again was illegal.

    Returns:
        The rewrite of the N rows, each as a canvas of its own.
    """
    lists: list[list[int]] = [[]] * len(rows)
    if rewrite is not None and rewrite.allowed is not None:
        lists = rewrite.allowed[rewrite.canvas[rows]].tolist()
    allowed, forbidden = _as_lists(masks, lists)
    own = Rewrite(
        canvas=torch.arange(len(rows), device=rows.device),
        allowed=_padded(allowed, rows.device),
        forbidden=_padded(forbidden, rows.device),
    )
    if rewrite is None:
        return own
    canvas = rewrite.canvas[rows]
    if rewrite.greedy is not None:
        own = replace(own, greedy=rewrite.greedy[canvas])
    if rewrite.bias is not None:
        ids, bias = rewrite.bias
        own = replace(own, bias=(ids[canvas], bias[canvas]))
    if (cost := rewrite.penalties) is not None:
        own = replace(own, penalties=cost.take(canvas))
    if rewrite.forbidden is not None:
        parts = [rewrite.forbidden[rows], *([] if own.forbidden is None else [own.forbidden])]
        own = replace(own, forbidden=torch.cat(parts, dim=1))
    if (asked := rewrite.truncation) is not None:
        own = replace(own, truncation=asked.take(canvas))
    return own


def _as_lists(
    masks: Sequence[Tensor], lists: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The allowed ids of every row, or the forbidden ones: the shorter list, the other empty.

    Args:
        masks: [V] bool for each row.
        lists: the ids that its request allows, -1 pads; of -1 alone, or empty, for all.
    """
    allowed, forbidden = [], []
    for mask, mine in zip(masks, lists, strict=True):
        both = [token for token in mine if token >= 0 and mask[token]]
        few = bool(both) or 2 * int(mask.sum()) <= len(mask)
        legal = torch.tensor(both) if both else mask.nonzero()[:, 0]
        allowed.append(legal if few else legal[:0])
        forbidden.append(legal[:0] if few else (~mask).nonzero()[:, 0])
    return allowed, forbidden


def _padded(lists: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """[N, M] int64, -1 pads; None where all lists are empty."""
    if not any(len(each) for each in lists):
        return None
    padded = torch.nn.utils.rnn.pad_sequence([*lists], batch_first=True, padding_value=-1)
    return upload(padded, device)
