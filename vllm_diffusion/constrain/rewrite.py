"""What the requests of a batch change in the logits of their canvas rows, as lists of ids.

B canvases, R rows. The order in which the parts apply, and what each does: ``constrain.logits``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_diffusion.records import TensorRecord

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """min_p, top_k and top_p, by canvas of the batch."""

    min_p: Tensor  # [B] fp32, share of the largest probability; 0 keeps all
    top_k: Tensor  # [B] int64, ids kept, 1..vocab; vocab keeps all
    top_p: Tensor  # [B] fp32, probability mass kept; 1 keeps all
    sorts: bool  # some top_k or top_p truncates, so ids must be ordered; min_p needs no order

    def take(self, index: Tensor) -> Truncation:
        """The truncation of the canvases ``index`` [N] int64, one entry for each."""
        return Truncation(
            min_p=self.min_p[index],
            top_k=self.top_k[index],
            top_p=self.top_p[index],
            sorts=self.sorts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties(TensorRecord):
    """Penalties of the ids in the text before a canvas.

    An id may be listed more than once, always with the same numbers.
    """

    ids: Tensor  # [B, N] int64
    scale: Tensor  # [B, N] fp32, positive logits are divided by it, negative multiplied
    offset: Tensor  # [B, N] fp32, subtracted after that


@dataclass(frozen=True, slots=True, kw_only=True)
class BadWords(TensorRecord):
    """The bad words of a batch, W a canvas, and the output before each canvas."""

    rest: Tensor  # [B, W, P] int64, tokens before the last one, right-aligned; -1 pads
    last: Tensor  # [B, W] int64, the token that ends the word; -1 pads
    before: Tensor  # [B, P] int64, output tokens before the canvas; below -1 where there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class Slack(TensorRecord):
    """Which rows of finished canvases reach the output, see ``constrain.slack``."""

    shown: Tensor  # [B, L] bool, the row may reach the output; others are context
    hole: Tensor  # [B, L] bool, shown and free: its token may be slack
    pad: Tensor  # [B] int64, the id that is slack in a hole; -1 for none
    end: Tensor  # [B] int64, ends an output from which slack was dropped; -1 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the host knows of one canvas's part in a ``Rewrite``, from the request alone."""

    moves: bool  # some logits may move or be forbidden
    cuts: bool  # the distribution is truncated
    allowed: Tensor | None  # [N] int64 on the device, ascending, each once; None allows every id


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What the requests of a batch change in the logits of R canvas rows.

    Sparse on purpose: lists of ids, by canvas of the batch or by row, never [R, vocab]. A head that
    reads the vocabulary tile by tile can apply the part that falls into a tile. A part is None
    where no request asks for it. What the parts do, and in which order: ``constrain.logits``.
    """

    canvas: Tensor  # [R] int64, which canvas of the batch a row belongs to
    temperature: Tensor | None = None  # [B] fp32, factor of the schedule
    greedy: Tensor | None = None  # [B] bool, the kept token is the argmax
    allowed: Tensor | None = None  # [B, N] int64, -1 pads; a list of -1 alone allows every id
    bias: tuple[Tensor, Tensor] | None = None  # [B, N] int64 ids, [B, N] fp32 added; pads add 0
    penalties: Penalties | None = None
    forbidden: Tensor | None = None  # [R, N] int64, ids that must not stand there; -1 pads
    pinned: Tensor | None = None  # [R] int64, the only id that may stand there; -1 where free
    truncation: Truncation | None = None
    words: BadWords | None = None  # for the end of a canvas; ``forbidden`` has what a step needs
    slack: Slack | None = None  # for the end of a canvas
    wishes: tuple[Wish, ...] | None = None  # by canvas, if these are all rows of the batch

    def take(self, index: slice | Tensor) -> Rewrite:
        """The rewrite of some of the rows; parts by canvas stay whole."""
        return replace(
            self,
            wishes=None,
            canvas=self.canvas[index],
            forbidden=None if self.forbidden is None else self.forbidden[index],
            pinned=None if self.pinned is None else self.pinned[index],
        )

    def changes_logits(self) -> bool:
        """Whether some request changes more than temperature and greediness."""
        parts = (
            self.allowed,
            self.bias,
            self.penalties,
            self.forbidden,
            self.pinned,
            self.truncation,
        )
        return any(part is not None for part in parts)

    def without_masks(self) -> Rewrite:
        """Bias and penalties alone."""
        return replace(self, allowed=None, forbidden=None, pinned=None, truncation=None)
