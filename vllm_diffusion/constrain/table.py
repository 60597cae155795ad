"""ConstraintTable: the wishes of the request in every slot, and a batch's ``Rewrite`` from them.

The table lives on the host. What the slots of a batch ask for once and for all is stacked into
tensors when the batch is first seen and kept while its slots stay the same; what depends on the
text, the position or the last step is computed on the device in every step. A batch in which nobody
asks for anything costs one look at a dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.constraints import Constraints, Holes
from vllm_diffusion.constrain.crossing import on_device, sent
from vllm_diffusion.constrain.penalties import text_penalties
from vllm_diffusion.constrain.pins import by_position
from vllm_diffusion.constrain.rewrite import BadWords, Rewrite, Slack, Truncation, Wish
from vllm_diffusion.constrain.words import UNKNOWN, forbidden_ids, output_before, word_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.records import CanvasBatch

_NOTHING: Final = Constraints()
_ALL_SHOWN: Final = Holes(shown=1 << 32, pad=-1, end=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacked:
    """What the canvases of a batch ask for, whatever the step."""

    constant: Rewrite  # the parts that no step changes
    prompt_length: Tensor  # [B] int64
    early: tuple[Tensor, Tensor] | None  # [B, N] int64 ids, [B, N] int64 first position allowed
    pins: Tensor | None  # [B, L] int64, by position of the output; -1 where free
    penalties: tuple[Tensor, Tensor, Tensor] | None  # repetition, frequency, presence: [B] fp32
    words: tuple[Tensor, Tensor] | None  # ``BadWords`` without the text
    holes: tuple[Tensor, Tensor, Tensor] | None  # ``Holes``: shown, pad, end: [B] int64


class ConstraintTable:
    """Constraints by slot; ``admit`` overwrites whatever the slot's last owner asked for."""

    def __init__(self, *, canvas_length: int, vocab_size: int, device: torch.device) -> None:
        self.canvas_length = canvas_length
        self.vocab_size = vocab_size
        self.device = device
        self._owners: dict[int, tuple[Constraints, int]] = {}
        self._seen: tuple[tuple[int, ...], _Stacked] | None = None

    def admit(self, slot: int, constraints: Constraints, *, prompt_length: int) -> None:
        """Give the slot's canvases to a request."""
        self._seen = None
        self._owners.pop(slot, None)
        if constraints != _NOTHING:
            self._owners[slot] = constraints, prompt_length

    def concern(self, slots: Sequence[int]) -> bool:
        """Whether a request in some of the slots asks for anything."""
        return not self._owners.keys().isdisjoint(slots)

    def rewrite(
        self,
        slots: Sequence[int],
        batch: CanvasBatch,
        *,
        text: Tensor,
        argmax: Tensor,
        step: Tensor,
    ) -> Rewrite | None:
        """What the requests of a batch change, or None where nobody asks for anything.

        Args:
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
            text: [S, N] int, prompt and committed tokens of every slot, N at least the longest.
            argmax: [S, L] int64, of every slot's last step.
            step: [S] int64, steps taken on every slot's canvas.
        """
        if not self.concern(slots):
            return None
        stacked = self._stack(tuple(slots))
        num, length = batch.position.shape
        start = batch.position[:, 0]
        rewrite = stacked.constant
        if stacked.penalties is not None:
            repetition, frequency, presence = stacked.penalties
            rewrite = replace(
                rewrite,
                penalties=text_penalties(
                    text[batch.slots].long(),
                    start,
                    stacked.prompt_length,
                    repetition=repetition,
                    frequency=frequency,
                    presence=presence,
                ),
            )
        forbidden = []
        if stacked.early is not None:
            ids, until = stacked.early
            offset = batch.position - stacked.prompt_length[:, None]
            forbidden.append(torch.where(offset[..., None] < until[:, None], ids[:, None], -1))
        if stacked.words is not None:
            rest, last = stacked.words
            before = output_before(
                text[batch.slots].long(), start, stacked.prompt_length, rest.shape[2]
            )
            words = BadWords(rest=rest, last=last, before=before)
            known = step[batch.slots][:, None] > 0
            guess = torch.where(known, argmax[batch.slots], UNKNOWN)
            forbidden.append(forbidden_ids(words, guess))
            rewrite = replace(rewrite, words=words)
        if forbidden:
            flat = torch.cat(forbidden, dim=-1).reshape(num * length, -1)
            rewrite = replace(rewrite, forbidden=flat)
        if stacked.pins is not None:
            pinned = by_position(stacked.pins, stacked.prompt_length, batch.position)
            rewrite = replace(rewrite, pinned=pinned.flatten())
            if stacked.holes is not None:
                most, pad, end = stacked.holes
                shown = batch.position < (stacked.prompt_length + most)[:, None]
                slack = Slack(shown=shown, hole=shown & (pinned < 0), pad=pad, end=end)
                rewrite = replace(rewrite, slack=slack)
        return rewrite

    def first_input(self, slots: Sequence[int], position: Tensor) -> tuple[Tensor, Tensor] | None:
        """How canvases that begin differ from noise at the first step; None if none does.

        Args:
            slots: B slots, on the host.
            position: [B, L] int64, absolute.

        Returns:
            Their tokens, [B, L] int64, -1 where noise stays; the step they begin at, [B] int64.
        """
        owners = [self._owners.get(slot, (_NOTHING, 0)) for slot in slots]
        if not any(mine.seed_canvas for mine, _ in owners):
            return None
        prompt_length = self._tensor([length for _, length in owners])
        seeds = self._lists([mine.seed_canvas for mine, _ in owners])
        step = self._tensor([mine.first_step or 0 for mine, _ in owners])
        behind = self._tensor([length + len(mine.seed_canvas) for mine, length in owners])
        return (
            by_position(seeds, prompt_length, position),
            torch.where(position[:, 0] < behind, step, 0),
        )

    def has_draft(self, slots: Sequence[int]) -> bool:
        """Whether the seed canvas of some slot may reach canvases behind the first one."""
        owners = (self._owners[slot][0] for slot in slots if slot in self._owners)
        return any(mine.first_step is not None for mine in owners)

    def _stack(self, slots: tuple[int, ...]) -> _Stacked:
        if self._seen is None or self._seen[0] != slots:
            self._seen = slots, self._stacked([self._owners.get(s, (_NOTHING, 0)) for s in slots])
        return self._seen[1]

    def _stacked(self, owners: Sequence[tuple[Constraints, int]]) -> _Stacked:
        asked = [mine for mine, _ in owners]
        early = [mine.early for mine in asked]
        pins = [_pinned_tokens(mine) for mine in asked]
        penalties = [(mine.repetition, mine.frequency, mine.presence) for mine in asked]
        words = tuple(mine.bad_words for mine in asked)
        repetition, frequency, presence = (list(each) for each in zip(*penalties, strict=True))
        return _Stacked(
            constant=self._constant(asked),
            prompt_length=self._tensor([length for _, length in owners]),
            early=(
                self._lists([[token for token, _ in each] for each in early]),
                self._lists([[until for _, until in each] for each in early]),
            )
            if any(early)
            else None,
            pins=self._lists(pins) if any(pins) else None,
            penalties=(
                self._tensor(repetition, torch.float32),
                self._tensor(frequency, torch.float32),
                self._tensor(presence, torch.float32),
            )
            if any(each != (1, 0, 0) for each in penalties)
            else None,
            words=word_table(words, self.device) if any(words) else None,
            holes=self._holes(asked),
        )

    def _holes(self, asked: Sequence[Constraints]) -> tuple[Tensor, Tensor, Tensor] | None:
        if all(mine.holes is None for mine in asked):
            return None
        holes = [mine.holes or _ALL_SHOWN for mine in asked]
        return (
            self._tensor([each.shown for each in holes]),
            self._tensor([each.pad for each in holes]),
            self._tensor([each.end for each in holes]),
        )

    def _constant(self, asked: Sequence[Constraints]) -> Rewrite:
        rows = torch.arange(len(asked), device=self.device).repeat_interleave(self.canvas_length)
        rewrite = Rewrite(canvas=rows)
        temperatures = [mine.temperature for mine in asked]
        if any(each != 1 for each in temperatures):
            # Greedy statistics stay at the schedule's own temperature: towards 0 every entropy
            # would be 0 and the first step would accept pure noise's argmax everywhere.
            factor = self._tensor([each or 1.0 for each in temperatures], torch.float32)
            rewrite = replace(rewrite, temperature=factor)
        if not all(temperatures):
            greedy = self._tensor([each == 0 for each in temperatures], torch.bool)
            rewrite = replace(rewrite, greedy=greedy)
        if any(mine.allowed for mine in asked):
            rewrite = replace(rewrite, allowed=self._lists([mine.allowed for mine in asked]))
        if any(mine.bias for mine in asked):
            ids = self._lists([[token for token, _ in mine.bias] for mine in asked], 0)
            bias = [
                torch.tensor([value for _, value in mine.bias], dtype=torch.float32)
                for mine in asked
            ]
            added = torch.nn.utils.rnn.pad_sequence(bias, batch_first=True)
            rewrite = replace(rewrite, bias=(ids, sent(added, self.device)))
        cuts = [(mine.min_p, mine.top_k or self.vocab_size, mine.top_p) for mine in asked]
        if any(each != (0, self.vocab_size, 1) for each in cuts):
            min_p, top_k, top_p = (list(each) for each in zip(*cuts, strict=True))
            truncation = Truncation(
                min_p=self._tensor(min_p, torch.float32),
                top_k=self._tensor(top_k),
                top_p=self._tensor(top_p, torch.float32),
                sorts=any(k < self.vocab_size or p < 1 for _, k, p in cuts),
            )
            rewrite = replace(rewrite, truncation=truncation)
        if self.device.type != "cpu":
            rewrite = replace(rewrite, wishes=tuple(self._wish(mine) for mine in asked))
        return rewrite

    def _wish(self, asked: Constraints) -> Wish:
        moving = ("bias", "repetition", "frequency", "presence", "early", "bad_words")
        cutting = ("min_p", "top_k", "top_p")
        return Wish(
            moves=any(getattr(asked, name) != getattr(_NOTHING, name) for name in moving),
            cuts=any(getattr(asked, name) != getattr(_NOTHING, name) for name in cutting),
            allowed=self._tensor(sorted(set(asked.allowed))) if asked.allowed else None,
        )

    def _tensor(self, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return on_device(values, self.device, dtype)

    def _lists(self, lists: Sequence[Sequence[int]], pad: int = -1) -> Tensor:
        """[B, N] int64, padded on the right to the longest, at least one wide."""
        width = max(1, *(len(each) for each in lists))
        padded = [[*each, *[pad] * (width - len(each))] for each in lists]
        return on_device(padded, self.device)


def _pinned_tokens(asked: Constraints) -> list[int]:
    """The seed canvas's token at pinned positions, -1 elsewhere; empty without pins."""
    if not asked.pinned:
        return []
    held = set(asked.pinned)
    return [token if at in held else -1 for at, token in enumerate(asked.seed_canvas)]
