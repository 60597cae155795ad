"""The frozen records that cross a stage border. B canvases, R rows, L canvas length, H width.

head -> step        CanvasStats    what the model believes about every position
denoise -> canvas   Decision       what becomes of every position
canvas -> engine    Emission       what the engine may count as generated
"""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The key of every row's noise, see ``denoise.rng``."""

    seed: Tensor  # [R, 2] int64, words of the request seed
    position: Tensor  # [R] int64
    step: Tensor  # [R] int64

    def rows(self, index: slice) -> Noise:
        """The keys of some of the rows."""
        return Noise(seed=self.seed[index], position=self.position[index], step=self.step[index])


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

    @staticmethod
    def concatenate(parts: Sequence[CanvasStats]) -> CanvasStats:
        """Join statistics along their first dimension."""
        return CanvasStats(
            argmax=torch.cat([p.argmax for p in parts]),
            sample=torch.cat([p.sample for p in parts]),
            entropy=torch.cat([p.entropy for p in parts]),
            top_prob=torch.cat([p.top_prob for p in parts]),
            margin=torch.cat([p.margin for p in parts]),
            soft_embedding=torch.cat([p.soft_embedding for p in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What one step makes of a batch of canvases."""

    accept: Tensor  # [B, L] bool
    next_tokens: Tensor  # [B, L] int64, input of the next denoising step
    finished: Tensor  # [B] bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """What a batch of canvases gives the engine after a step."""

    tokens: Tensor  # [B, L] int64, the committed canvas where count > 0
    count: Tensor  # [B] int64, committed tokens: 0 or the canvas width
    steps: Tensor  # [B] int64, denoising steps the committed canvas took, 0 where count is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleConstants:
    """The published constants of a checkpoint's decoding rule (host side)."""

    max_steps: int
    t_min: float
    t_max: float
    entropy_bound: float  # nats
    confidence_threshold: float  # nats
    stability_threshold: int  # steps
