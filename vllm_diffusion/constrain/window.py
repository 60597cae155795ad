"""The part of a ``Rewrite`` that concerns some ids: a tile of the vocabulary, or a list.

The meaning of a rewrite stays in one place: a part is a ``Rewrite`` again, over ids 0 .. n - 1 that
stand for the chosen ones, and goes through ``rewrite_logits`` like any other. One more column, n,
stands for every other id; its logits are dropped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.logits import rewrite_logits
from vllm_diffusion.constrain.rewrite import Penalties, Rewrite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class TiledRewrite:
    """A rewrite that is applied to one tile of the vocabulary at a time.

    Its lists are sorted once, so that a tile costs only what falls into it. The host must know how
    much that is: a batch that rewrites anything waits for the device here.

    Args:
        rewrite: of R rows.
        edges: first id of every tile, and the end of the last.
        vocab: ids there are.
    """

    def __init__(self, rewrite: Rewrite, edges: Tensor, vocab: int) -> None:
        self._rewrite = rewrite
        self._forbidden = self._allowed = self._bias = self._penalties = None
        if rewrite.forbidden is not None:
            self._forbidden = _InTiles(feasible_forbidden(rewrite, vocab), edges)
        if rewrite.allowed is not None:
            self._allowed = _InTiles(rewrite.allowed, edges)
            self._lists_any = (rewrite.allowed >= 0).any(dim=1, keepdim=True)
        if rewrite.bias is not None:
            self._bias = _InTiles(rewrite.bias[0], edges)
        if rewrite.penalties is not None:
            self._penalties = _InTiles(rewrite.penalties.ids, edges)
        lists = (self._forbidden, self._allowed, self._bias, self._penalties)
        _InTiles.measure([each for each in lists if each is not None])

    def apply(self, logits: Tensor, tile: int, start: int) -> Tensor:
        """Rewrite the logits [R, n] fp32 of a tile, which begins at id ``start``."""
        part = self._part(tile, start, logits.shape[1])
        # The extra column is finite, so no row of a tile looks as if nothing were left to say:
        # that was settled over the whole vocabulary before.
        padded = torch.nn.functional.pad(logits, (0, 1))
        return rewrite_logits(padded, part)[:, :-1]

    def _part(self, tile: int, start: int, width: int) -> Rewrite:
        whole = self._rewrite
        part = Rewrite(canvas=whole.canvas)
        if (lists := self._allowed) is not None:
            # The extra column is allowed too, so that a row with a list has one in every tile.
            ids = torch.where(self._lists_any, lists.ids(tile, start, width), -1)
            part = replace(part, allowed=ids)
        if (lists := self._bias) is not None and lists.any(tile):
            assert whole.bias is not None
            bias = lists.values(whole.bias[1], tile, 0.0)
            part = replace(part, bias=(lists.ids(tile, start, width), bias))
        if (lists := self._penalties) is not None and lists.any(tile):
            cost = whole.penalties
            assert cost is not None
            penalties = Penalties(
                ids=lists.ids(tile, start, width),
                scale=lists.values(cost.scale, tile, 1.0),
                offset=lists.values(cost.offset, tile, 0.0),
            )
            part = replace(part, penalties=penalties)
        if (lists := self._forbidden) is not None and lists.any(tile):
            part = replace(part, forbidden=lists.ids(tile, start, -1))
        if whole.pinned is not None:
            local = whole.pinned - start
            inside = (local >= 0) & (local < width)
            local = torch.where(inside, local, width)
            part = replace(part, pinned=torch.where(whole.pinned < 0, -1, local))
        return part


class _InTiles:
    """Lists of ids in ascending order, and where in them every tile begins."""

    def __init__(self, ids: Tensor, edges: Tensor) -> None:
        self._ids, self._order = ids.sort(dim=1)
        self.first = torch.searchsorted(self._ids, edges.expand(len(ids), -1).contiguous())
        self.widths: list[int] = []

    @staticmethod
    def measure(lists: Sequence[_InTiles]) -> None:
        """Read how much of each falls into a tile, of all of them at once."""
        if lists:
            widths = torch.stack([each.first.diff(dim=1).amax(dim=0) for each in lists])
            for each, mine in zip(lists, widths.tolist(), strict=True):
                each.widths = mine

    def any(self, tile: int) -> bool:
        """Whether any list has an id in the tile."""
        return self.widths[tile] > 0

    def ids(self, tile: int, start: int, padding: int) -> Tensor:
        """[lists, K] ids of the tile, counted from its start."""
        place, inside = self._window(tile)
        return torch.where(inside, self._ids.gather(1, place) - start, padding)

    def values(self, values: Tensor, tile: int, padding: float) -> Tensor:
        """[lists, K] the numbers that come with these ids."""
        place, inside = self._window(tile)
        return torch.where(inside, values.gather(1, self._order.gather(1, place)), padding)

    def _window(self, tile: int) -> tuple[Tensor, Tensor]:
        # One more than any list has, so that every list ends with padding.
        offset = torch.arange(self.widths[tile] + 1, device=self._ids.device)
        place = self.first[:, tile, None] + offset
        inside = place < self.first[:, tile + 1, None]
        return place.clamp(max=self._ids.shape[1] - 1), inside


def feasible_forbidden(rewrite: Rewrite, vocab: int) -> Tensor:
    """``rewrite.forbidden`` without the rows in which it would leave no id, see ``forbid``."""
    assert rewrite.forbidden is not None
    forbidden = rewrite.forbidden.sort(dim=1).values
    new = torch.ones_like(forbidden, dtype=torch.bool)
    new[:, 1:] = forbidden[:, 1:] != forbidden[:, :-1]
    nothing_left = (new & (forbidden >= 0)).sum(dim=1) >= vocab
    if rewrite.allowed is not None:
        allowed = rewrite.allowed[rewrite.canvas]
        place = torch.searchsorted(forbidden, allowed).clamp(max=forbidden.shape[1] - 1)
        kept = (allowed >= 0) & (forbidden.gather(1, place) != allowed)
        nothing_left |= (allowed >= 0).any(dim=1) & ~kept.any(dim=1)
    return rewrite.forbidden.masked_fill(nothing_left[:, None], -1)


def rewrite_listed(logits: Tensor, rewrite: Rewrite, ids: Tensor) -> Tensor:
    """``rewrite_logits`` for rows with a short list of allowed ids.

    Args:
        logits: [R, N] fp32, of these ids.
        rewrite: of these R rows; its lists of allowed ids are assumed to be ``ids``.
        ids: [N] int64, ascending.

    Returns:
        [R, N] fp32.
    """

    def listed(others: Tensor) -> Tensor:
        place = torch.searchsorted(ids, others).clamp(max=len(ids) - 1)
        return torch.where(ids[place] == others, place, len(ids))

    part = Rewrite(canvas=rewrite.canvas)
    if rewrite.bias is not None:
        part = replace(part, bias=(listed(rewrite.bias[0]), rewrite.bias[1]))
    if (cost := rewrite.penalties) is not None:
        part = replace(part, penalties=replace(cost, ids=listed(cost.ids)))
    if rewrite.forbidden is not None:
        part = replace(part, forbidden=listed(rewrite.forbidden))
    # -inf in the extra column: a row whose every listed id is forbidden has nothing left to say.
    padded = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)
    # What the extra column gets from penalties of many ids at once does not matter: it is dropped.
    return rewrite_logits(padded, part)[:, :-1]
