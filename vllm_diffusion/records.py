"""The frozen records that cross a stage border. B canvases, R rows, L canvas length, H width.

constrain -> head   Rewrite        what requests change in the distribution of every position
head -> step        CanvasStats    what the model believes about every position
head -> step        ClassStats     the same by class of tokens, for canvases under a constraint
denoise -> canvas   Decision       what becomes of every position
canvas -> engine    Emission       what the engine may count as generated
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

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
class Noise:
    """The key of every row's noise, see ``denoise.rng``."""

    seed: Tensor  # [R, 2] int64, words of the request seed
    position: Tensor  # [R] int64
    step: Tensor  # [R] int64

    def rows(self, index: slice | Tensor) -> Noise:
        """The keys of some of the rows."""
        return Noise(seed=self.seed[index], position=self.position[index], step=self.step[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """How much of every canvas's distribution survives, by canvas of the batch."""

    min_p: Tensor  # [B] fp32, share of the largest probability; 0 keeps all
    top_k: Tensor  # [B] int64, ids kept, 1..vocab; vocab keeps all
    top_p: Tensor  # [B] fp32, probability mass kept; 1 keeps all
    sorts: bool  # some top_k or top_p cuts: min_p alone needs no order


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalties:
    """Ids that a canvas's text holds and what they cost there.

    An id may be listed more than once, always with the same numbers.
    """

    ids: Tensor  # [B, N] int64
    scale: Tensor  # [B, N] fp32, positive logits are divided by it, negative multiplied
    offset: Tensor  # [B, N] fp32, subtracted after that


@dataclass(frozen=True, slots=True, kw_only=True)
class BadWords:
    """The bad words of a batch, W a canvas, and the output before each canvas."""

    rest: Tensor  # [B, W, P] int64, tokens before the last one, right-aligned; -1 pads
    last: Tensor  # [B, W] int64, the token that ends the word; -1 pads
    before: Tensor  # [B, P] int64, output tokens before the canvas; below -1 where there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class Slack:
    """Which rows of a batch's finished canvases its output takes, see ``constrain.slack``."""

    shown: Tensor  # [B, L] bool, the output may take it; others are context
    hole: Tensor  # [B, L] bool, shown and free: its token may be slack
    pad: Tensor  # [B] int64, the id that is slack in a hole; -1 where none is
    end: Tensor  # [B] int64, stands behind an output with slack in it; -1 for nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the host knows of one canvas in a ``Rewrite``, from the request alone."""

    moves: bool  # some logits may move or be forbidden
    cuts: bool  # the distribution is cut
    allowed: Tensor | None  # [N] int64 on the device, ascending, each once; None allows every id


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """What the requests of a batch change in the logits of R canvas rows.

    Sparse on purpose: lists of ids, by canvas of the batch or by row, never [R, vocab], so that a
    head that sees a tile of the vocabulary at a time can apply the part that falls into the tile.
    None where nobody asks. What the parts do, and in which order: ``constrain.rewrite``.
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
    wishes: tuple[Wish, ...] | None = None  # of every canvas, where these are all of its rows

    def rows(self, index: slice | Tensor) -> Rewrite:
        """The rewrite of some of the rows; what is told by canvas stays whole."""
        return replace(
            self,
            wishes=None,
            canvas=self.canvas[index],
            forbidden=None if self.forbidden is None else self.forbidden[index],
            pinned=None if self.pinned is None else self.pinned[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CanvasStats:
    """What a head says about every position, of softmax(logits / temperature). Never [B, L, vocab].

    A head works on flat rows, the rules on canvases: the leading shape is [R] or [B, L].
    """

    argmax: Tensor  # [B, L] int64
    sample: Tensor  # [B, L] int64
    entropy: Tensor  # [B, L] fp32, nats
    top_prob: Tensor  # [B, L] fp32
    margin: Tensor  # [B, L] fp32, top probability minus the second
    soft_embedding: Tensor  # [B, L, H] model dtype, softmax @ embedding, scaled like an embedding

    def reshape(self, *leading: int) -> CanvasStats:
        """The same statistics under another leading shape."""
        return CanvasStats(
            argmax=self.argmax.reshape(leading),
            sample=self.sample.reshape(leading),
            entropy=self.entropy.reshape(leading),
            top_prob=self.top_prob.reshape(leading),
            margin=self.margin.reshape(leading),
            soft_embedding=self.soft_embedding.reshape(*leading, self.soft_embedding.shape[-1]),
        )

    def renamed(self, ids: Tensor) -> CanvasStats:
        """The same, ids looked up in ``ids`` [N], or [R, N] by row, int64."""
        by_row = ids.expand(len(self.argmax), -1)
        return replace(
            self,
            argmax=by_row.gather(1, self.argmax[:, None])[:, 0],
            sample=by_row.gather(1, self.sample[:, None])[:, 0],
        )

    @staticmethod
    def of_nothing(hidden: Tensor) -> CanvasStats:
        """Zeros for the rows of ``hidden`` [R, H], which nobody will read."""
        zeros = torch.zeros(len(hidden), device=hidden.device)
        ids = zeros.long()
        return CanvasStats(
            argmax=ids,
            sample=ids,
            entropy=zeros,
            top_prob=zeros,
            margin=zeros,
            soft_embedding=torch.zeros_like(hidden),
        )

    def replaced(self, index: Tensor, others: CanvasStats) -> CanvasStats:
        """The same, other statistics at the rows ``index`` [N] int64, counted over all canvases."""

        def put(values: Tensor, other: Tensor) -> Tensor:
            rows = values.reshape(-1, *other.shape[1:])
            return rows.index_copy(0, index, other.to(values.dtype)).reshape(values.shape)

        return CanvasStats(
            argmax=put(self.argmax, others.argmax),
            sample=put(self.sample, others.sample),
            entropy=put(self.entropy, others.entropy),
            top_prob=put(self.top_prob, others.top_prob),
            margin=put(self.margin, others.margin),
            soft_embedding=put(self.soft_embedding, others.soft_embedding),
        )

    def where(self, mask: Tensor, others: CanvasStats) -> CanvasStats:
        """The same of [R] rows, others where ``mask`` [R] bool is not set."""

        def either(name: str) -> Tensor:
            one = getattr(self, name)
            return torch.where(mask.view(-1, *[1] * (one.dim() - 1)), one, getattr(others, name))

        return CanvasStats(**{field.name: either(field.name) for field in fields(CanvasStats)})

    def spread(self, index: Tensor, rows: int) -> CanvasStats:
        """These rows at the places ``index`` [R] int64 of ``rows`` rows, zeros elsewhere."""

        def placed(values: Tensor) -> Tensor:
            return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, index, values)

        return CanvasStats(
            argmax=placed(self.argmax),
            sample=placed(self.sample),
            entropy=placed(self.entropy),
            top_prob=placed(self.top_prob),
            margin=placed(self.margin),
            soft_embedding=placed(self.soft_embedding),
        )

    @staticmethod
    def concatenate(parts: Sequence[CanvasStats]) -> CanvasStats:
        """Join statistics along their first dimension."""
        if len(parts) == 1:
            return parts[0]
        return CanvasStats(
            argmax=torch.cat([p.argmax for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
            entropy=torch.cat([p.entropy for p in parts]),
            top_prob=torch.cat([p.top_prob for p in parts]),
            margin=torch.cat([p.margin for p in parts]),
            soft_embedding=torch.cat([p.soft_embedding for p in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassStats:
    """What a head says about R rows by class of tokens, C classes; see ``Head.by_class``.

    Class 0 holds the tokens that nobody asks about: its column is that of a class with no token.
    """

    log_mass: Tensor  # [R, C] fp32, log of the class's share of the row; -inf without a token
    entropy: Tensor  # [R, C] fp32, nats, of the distribution inside the class; 0 without a token
    best: Tensor  # [R, C] int64, its likeliest token, the lowest id among equals; -1 for none
    best_log_prob: Tensor  # [R, C] fp32, log of that token's share of the row; -inf for none
    second_log_prob: Tensor  # [R, C] fp32, of its next token; -inf for none
    sample: Tensor  # [R, C] int64, a token drawn inside the class; -1 for none

    def spread(self, index: Tensor) -> ClassStats:
        """These rows at the places ``index`` [R] int64, a permutation."""

        def placed(values: Tensor) -> Tensor:
            return torch.empty_like(values).index_copy_(0, index, values)

        return ClassStats(
            log_mass=placed(self.log_mass),
            entropy=placed(self.entropy),
            best=placed(self.best),
            best_log_prob=placed(self.best_log_prob),
            second_log_prob=placed(self.second_log_prob),
            sample=placed(self.sample),
        )

    @staticmethod
    def concatenate(parts: Sequence[ClassStats]) -> ClassStats:
        """Join statistics along their first dimension."""
        return ClassStats(
            log_mass=torch.cat([p.log_mass for p in parts]),
            entropy=torch.cat([p.entropy for p in parts]),
            best=torch.cat([p.best for p in parts]),
            best_log_prob=torch.cat([p.best_log_prob for p in parts]),
            second_log_prob=torch.cat([p.second_log_prob for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScores:
    """What the model's own distribution says of chosen tokens: temperature 1, nothing rewritten."""

    ids: Tensor  # [R, 1 + N] int64, the chosen token and the ids beside it
    values: Tensor  # [R, 1 + N] fp32, log-probabilities, or logits where those were asked for
    ranks: Tensor  # [R] int64, ids whose logit is at least the chosen one's: 1 is the best

    @staticmethod
    def concatenate(parts: Sequence[TokenScores]) -> TokenScores:
        """Join scores along their first dimension."""
        names = [field.name for field in fields(TokenScores)]
        return TokenScores(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Holes:
    """A request whose one canvas is a text with holes: what of it is the answer (host side)."""

    shown: int  # rows the answer may take; those behind are context
    pad: int  # id that fills what a hole has too much; -1 for none
    end: int  # id that ends an answer which does not take all shown rows; -1 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What one request changes in the distribution of its canvases (host side).

    The defaults change nothing. Positions are counted from the first token of the output.
    """

    temperature: float = 1.0  # factor of the schedule; 0: the kept token is the argmax
    min_p: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    allowed: tuple[int, ...] = ()  # empty allows every id
    bias: tuple[tuple[int, float], ...] = ()  # (id, added to its logit)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    early: tuple[tuple[int, int], ...] = ()  # (id, position before which it must not stand)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of every word
    seed_canvas: tuple[int, ...] = ()  # first input of the canvas at these positions; -1 is noise
    pinned: tuple[int, ...] = ()  # positions that hold the seed canvas's token
    holes: Holes | None = None  # the pinned positions are a text with holes
    first_step: int | None = None  # the seed canvas is a draft: its canvases' first step
