"""The frozen records that cross a stage border. B canvases, R rows, L canvas length, H width.

engine -> step      CanvasBatch    which canvases run
step -> head        Noise          the key of every row's sample
head -> step        CanvasStats    what the model believes about every position
denoise -> canvas   Decision       what becomes of every position
canvas -> engine    Emission       what the engine may count as generated
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasBatch:
    """The canvases that run in one step; made by the engine, read by every stage."""

    slots: Tensor  # [B] int64, rows of the CanvasPool
    width: Tensor  # [B] int64, positions in use, 1..L
    position: Tensor  # [B, L] int64, absolute position of every row, valid or not
    valid: Tensor  # [B, L] bool, False beyond width
    idle: Tensor | None = None  # [B] bool, no canvas ran: nothing is given; None for nowhere


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """A record of tensors that share their leading dimension, and what holds for all its fields.

    A field may be None: then it is None in every record that is made from this one.
    """

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The record with every tensor changed."""
        changed = {}
        for name in self.__dataclass_fields__:
            values = getattr(self, name)
            changed[name] = None if values is None else change(values)
        return type(self)(**changed)

    def combine(self, other: Self, change: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """The record with every tensor changed by the same field of ``other``."""
        changed = {}
        for name in self.__dataclass_fields__:
            values = getattr(self, name)
            changed[name] = None if values is None else change(values, getattr(other, name))
        return type(self)(**changed)

    def take(self, index: slice | Tensor) -> Self:
        """Some of the rows."""
        return self.map(lambda values: values[index])

    def spread(self, index: Tensor, rows: int) -> Self:
        """These rows at the places ``index`` [R] int64 of ``rows`` rows, zeros elsewhere."""

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, index, values)

        return self.map(placed)

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Join records along their first dimension."""
        if len(parts) == 1:
            return parts[0]
        joined = {}
        for name in cls.__dataclass_fields__:
            values = [getattr(part, name) for part in parts]
            joined[name] = None if values[0] is None else torch.cat(values)
        return cls(**joined)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise(TensorRecord):
    """The key of every row's noise, see ``denoise.rng``."""

    seed: Tensor  # [R, 2] int64, words of the request seed
    position: Tensor  # [R] int64
    step: Tensor  # [R] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasStats(TensorRecord):
    """What a head says about every position, of softmax(logits / temperature). Never [B, L, vocab].

    A head works on flat rows, the rules on canvases: the leading shape is [R] or [B, L].
    """

    argmax: Tensor  # [B, L] int64
    sample: Tensor  # [B, L] int64
    entropy: Tensor  # [B, L] fp32, nats
    top_prob: Tensor  # [B, L] fp32
    margin: Tensor  # [B, L] fp32, top probability minus the second
    soft_embedding: Tensor | None
    """[B, L, H] model dtype, softmax @ embedding, scaled like an embedding; None for a model that
    is not conditioned on it."""
    sample_prob: Tensor | None = None
    """[B, L] fp32, probability of ``sample``; None where no rule asks."""
    own_prob: Tensor | None = None
    """[B, L] fp32, the same at temperature 1, nothing cut or rewritten; None where no rule asks."""

    @staticmethod
    def zeros(
        hidden: Tensor,
        *,
        self_conditioning: bool = True,
        sample_prob: bool = False,
        own_prob: bool = False,
    ) -> CanvasStats:
        """Zeros for the rows of ``hidden`` [R, H], where nobody reads them."""
        zeros = torch.zeros(len(hidden), device=hidden.device)
        ids = zeros.long()
        return CanvasStats(
            argmax=ids,
            sample=ids,
            entropy=zeros,
            top_prob=zeros,
            margin=zeros,
            soft_embedding=torch.zeros_like(hidden) if self_conditioning else None,
            sample_prob=zeros if sample_prob else None,
            own_prob=zeros if own_prob else None,
        )

    def reshape(self, *leading: int) -> CanvasStats:
        """The same statistics under another leading shape."""
        dims = self.argmax.dim()
        return self.map(lambda values: values.reshape(*leading, *values.shape[dims:]))

    def look_up(self, ids: Tensor) -> CanvasStats:
        """Tokens that are places in a list, replaced by its ids.

        Args:
            ids: [N] int64, or [R, N] int64 with a list for every row.
        """
        by_row = ids.expand(len(self.argmax), -1)
        return replace(
            self,
            argmax=by_row.gather(1, self.argmax[:, None])[:, 0],
            sample=by_row.gather(1, self.sample[:, None])[:, 0],
        )

    def replaced(self, index: Tensor, others: CanvasStats) -> CanvasStats:
        """The same with other statistics in some rows.

        Args:
            index: [N] int64, rows counted over all canvases.
            others: [N].
        """

        def put(values: Tensor, other: Tensor) -> Tensor:
            rows = values.reshape(-1, *other.shape[1:])
            return rows.index_copy(0, index, other.to(values.dtype)).reshape(values.shape)

        return self.combine(others, put)

    def where(self, mask: Tensor, others: CanvasStats) -> CanvasStats:
        """[R] rows: these where ``mask`` [R] bool is set, the others elsewhere."""

        def either(values: Tensor, other: Tensor) -> Tensor:
            return torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, other)

        return self.combine(others, either)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores(TensorRecord):
    """What the model's own distribution says of chosen tokens: temperature 1, nothing rewritten."""

    ids: Tensor  # [R, 1 + N] int64, the chosen token and the ids beside it
    values: Tensor  # [R, 1 + N] fp32, log-probabilities, or logits where those were asked for
    ranks: Tensor  # [R] int64, ids whose logit is at least the chosen one's: 1 is the best


class StopReason(IntEnum):
    """Why a canvas was finished; a number, so that the device can hold it."""

    SETTLED = 1  # the rule's own test: the argmax held and the canvas is certain
    STEPS = 2  # out of steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """What the canvases of a batch commit if they finish."""

    tokens: Tensor  # [B, L] int64, the input of the commit forward
    rows: Tensor | None = None  # [B, L] int64, the row each token comes from; None: its own
    count: Tensor | None = None  # [B] int64, tokens committed, 1 to the width; None: the width


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one step makes of a batch of canvases."""

    accept: Tensor  # [B, L] bool
    next_tokens: Tensor  # [B, L] int64, input of the next denoising step
    finished: Tensor  # [B] bool
    reason: Tensor  # [B] int64, a StopReason where finished, anything elsewhere
    commit: Commit  # of the canvases that finish, anything elsewhere


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """What a batch of canvases gives the engine after a step."""

    tokens: Tensor  # [B, L] int64, what is committed in the first ``count`` places
    count: Tensor  # [B] int64, committed tokens, at most the canvas width; 0 where none
    steps: Tensor  # [B] int64, denoising steps the committed canvas took, 0 where count is 0
    reason: Tensor  # [B] int64, StopReason of the committed canvas, anything where count is 0
    entropy: Tensor  # [B] fp32, nats, mean over its last step, anything where count is 0
    revealed: Tensor | None = None
    """[B, L] bool, positions of the canvas that got their token in this step, which stays; None
    where nothing is final before the canvas is finished."""
