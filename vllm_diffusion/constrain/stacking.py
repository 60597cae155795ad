"""The part of a batch's constraints that no step changes, as tensors.

In: ``Constraints``, one for each canvas. Out: ``Stacked``, from which ``table`` makes the
``Rewrite`` of every step while the batch holds the same requests.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.constraints import Constraints, Holes
from vllm_diffusion.constrain.rewrite import Rewrite, Truncation, Wish
from vllm_diffusion.constrain.transfer import on_device, upload
from vllm_diffusion.constrain.words import word_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NO_CONSTRAINTS: Final = Constraints()
_ALL_SHOWN: Final = Holes(shown=1 << 32, pad=-1, end=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacked:
    """What the canvases of a batch ask for in every step."""

    constant: Rewrite  # the parts that no step changes
    prompt_length: Tensor  # [B] int64
    early: tuple[Tensor, Tensor] | None  # [B, N] int64 ids, [B, N] int64 first position allowed
    pins: Tensor | None  # [B, L] int64, by position of the output; -1 where free
    penalties: tuple[Tensor, Tensor, Tensor] | None  # repetition, frequency, presence: [B] fp32
    words: tuple[Tensor, Tensor] | None  # ``BadWords`` without the text
    holes: tuple[Tensor, Tensor, Tensor] | None  # ``Holes``: shown, pad, end: [B] int64


class Stacking:
    """Makes ``Stacked`` for canvases of one length over one vocabulary.

    Args:
        canvas_length: L.
        vocab_size: ids there are.
        device: where the batches run.
    """

    def __init__(self, *, canvas_length: int, vocab_size: int, device: torch.device) -> None:
        self._canvas_length, self._vocab_size, self._device = canvas_length, vocab_size, device

    def stacked(self, asked: Sequence[Constraints], prompt_lengths: Sequence[int]) -> Stacked:
        """The constraints of B canvases.

        Args:
            asked: by canvas.
            prompt_lengths: tokens of each request's prompt.
        """
        early = [mine.early for mine in asked]
        pins = [_pinned_tokens(mine) for mine in asked]
        penalties = [(mine.repetition, mine.frequency, mine.presence) for mine in asked]
        words = tuple(mine.bad_words for mine in asked)
        repetition, frequency, presence = (list(each) for each in zip(*penalties, strict=True))
        return Stacked(
            constant=self._constant(asked),
            prompt_length=self.tensor(prompt_lengths),
            early=(
                self.lists([[token for token, _ in each] for each in early]),
                self.lists([[until for _, until in each] for each in early]),
            )
            if any(early)
            else None,
            pins=self.lists(pins) if any(pins) else None,
            penalties=(
                self.tensor(repetition, torch.float32),
                self.tensor(frequency, torch.float32),
                self.tensor(presence, torch.float32),
            )
            if any(each != (1, 0, 0) for each in penalties)
            else None,
            words=word_table(words, self._device) if any(words) else None,
            holes=self._holes(asked),
        )

    def _holes(self, asked: Sequence[Constraints]) -> tuple[Tensor, Tensor, Tensor] | None:
        if all(mine.holes is None for mine in asked):
            return None
        holes = [mine.holes or _ALL_SHOWN for mine in asked]
        return (
            self.tensor([each.shown for each in holes]),
            self.tensor([each.pad for each in holes]),
            self.tensor([each.end for each in holes]),
        )

    def _constant(self, asked: Sequence[Constraints]) -> Rewrite:
        rows = torch.arange(len(asked), device=self._device).repeat_interleave(self._canvas_length)
        rewrite = Rewrite(canvas=rows)
        temperatures = [mine.temperature for mine in asked]
        if any(each != 1 for each in temperatures):
            # Greedy statistics stay at the schedule's own temperature: towards 0 every entropy
            # would be 0 and the first step would accept pure noise's argmax everywhere.
            factor = self.tensor([each or 1.0 for each in temperatures], torch.float32)
            rewrite = replace(rewrite, temperature=factor)
        if not all(temperatures):
            greedy = self.tensor([each == 0 for each in temperatures], torch.bool)
            rewrite = replace(rewrite, greedy=greedy)
        if any(mine.allowed for mine in asked):
            rewrite = replace(rewrite, allowed=self.lists([mine.allowed for mine in asked]))
        if any(mine.bias for mine in asked):
            ids = self.lists([[token for token, _ in mine.bias] for mine in asked], 0)
            bias = [
                torch.tensor([value for _, value in mine.bias], dtype=torch.float32)
                for mine in asked
            ]
            added = torch.nn.utils.rnn.pad_sequence(bias, batch_first=True)
            rewrite = replace(rewrite, bias=(ids, upload(added, self._device)))
        cuts = [(mine.min_p, mine.top_k or self._vocab_size, mine.top_p) for mine in asked]
        if any(each != (0, self._vocab_size, 1) for each in cuts):
            min_p, top_k, top_p = (list(each) for each in zip(*cuts, strict=True))
            truncation = Truncation(
                min_p=self.tensor(min_p, torch.float32),
                top_k=self.tensor(top_k),
                top_p=self.tensor(top_p, torch.float32),
                sorts=any(k < self._vocab_size or p < 1 for _, k, p in cuts),
            )
            rewrite = replace(rewrite, truncation=truncation)
        if self._device.type != "cpu":
            rewrite = replace(rewrite, wishes=tuple(self._wish(mine) for mine in asked))
        return rewrite

    def _wish(self, asked: Constraints) -> Wish:
        moving = ("bias", "repetition", "frequency", "presence", "early", "bad_words")
        cutting = ("min_p", "top_k", "top_p")
        return Wish(
            moves=any(getattr(asked, name) != getattr(NO_CONSTRAINTS, name) for name in moving),
            cuts=any(getattr(asked, name) != getattr(NO_CONSTRAINTS, name) for name in cutting),
            allowed=self.tensor(sorted(set(asked.allowed))) if asked.allowed else None,
        )

    def tensor(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers of the host on the device."""
        return on_device(values, self._device, dtype)

    def lists(self, lists: Sequence[Sequence[int]], pad: int = -1) -> Tensor:
        """[B, N] int64, padded on the right to the longest, at least one wide."""
        width = max(1, *(len(each) for each in lists))
        padded = [[*each, *[pad] * (width - len(each))] for each in lists]
        return on_device(padded, self._device)


def _pinned_tokens(asked: Constraints) -> list[int]:
    """The seed canvas's token at pinned positions, -1 elsewhere; empty without pins."""
    if not asked.pinned:
        return []
    held = set(asked.pinned)
    return [token if at in held else -1 for at, token in enumerate(asked.seed_canvas)]
