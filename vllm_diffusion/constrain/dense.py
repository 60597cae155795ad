"""A ``Rewrite`` as tables over the vocabulary, a row a canvas: for GPUs.

``window`` sorts lists, so that a tile costs only what falls into it, and the host must know how
much that is. A table costs 4 bytes for each id of a canvas, and nobody waits. What the parts do:
``logits``. Lists by row are short and stay lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from vllm_diffusion.constrain.pins import pin
from vllm_diffusion.constrain.window import feasible_forbidden

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Rewrite


class DenseRewrite:
    """A rewrite that is applied to one tile of the vocabulary at a time.

    Args:
        rewrite: of R rows.
        vocab: ids there are.
    """

    def __init__(self, rewrite: Rewrite, vocab: int) -> None:
        self._canvas, self._pinned = rewrite.canvas, rewrite.pinned
        self._forbidden = None if rewrite.forbidden is None else feasible_forbidden(rewrite, vocab)
        self._banned = self._bias = self._scale = self._offset = None
        if (ids := rewrite.allowed) is not None:
            everything = (ids < 0).all(dim=1, keepdim=True)
            banned = torch.ones(len(ids), vocab + 1, dtype=torch.bool, device=ids.device)
            banned.scatter_(1, torch.where(ids < 0, vocab, ids), value=False)
            self._banned = banned[:, :-1] & ~everything
        if rewrite.bias is not None:
            ids, bias = rewrite.bias
            self._bias = bias.new_zeros(len(ids), vocab).scatter_add_(1, ids, bias)
        if (cost := rewrite.penalties) is not None:
            shape = len(cost.ids), vocab
            self._scale = cost.scale.new_ones(shape).scatter_(1, cost.ids, cost.scale)
            self._offset = cost.offset.new_zeros(shape).scatter_(1, cost.ids, cost.offset)

    def apply(self, logits: Tensor, tile: int, start: int) -> Tensor:
        """Rewrite the logits [R, n] fp32 of a tile, which begins at id ``start``."""
        del tile
        width = logits.shape[1]

        def part(table: Tensor) -> Tensor:
            return table[:, start : start + width][self._canvas]

        if self._banned is not None:
            logits = logits.masked_fill(part(self._banned), -torch.inf)
        if self._bias is not None:
            logits = logits + part(self._bias)
        if self._scale is not None and self._offset is not None:
            scale = part(self._scale)
            logits = torch.where(logits > 0, logits / scale, logits * scale) - part(self._offset)
        if self._forbidden is None and self._pinned is None:
            return logits
        # The extra column takes what is not in the tile.
        logits = pad(logits, (0, 1))
        if self._forbidden is not None:
            place = self._local(self._forbidden, start, width)
            logits.scatter_(1, place, -torch.inf)
        if self._pinned is not None:
            place = self._local(self._pinned, start, width)
            logits = pin(logits, torch.where(self._pinned < 0, -1, place))
        return logits[:, :-1]

    @staticmethod
    def _local(ids: Tensor, start: int, width: int) -> Tensor:
        place = ids - start
        return torch.where((place >= 0) & (place < width), place, width)
