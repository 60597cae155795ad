"""The constraints of the request in every slot, and the ``Rewrite`` of a batch made from them.

The table lives on the host. What no step changes is stacked into tensors when a batch is first seen
(``stacking``) and kept while its slots stay the same. What depends on the text, the position or the
last step is computed on the device in every step. A batch without constraints costs one look at a
dictionary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.constrain.penalties import text_penalties
from vllm_diffusion.constrain.pins import by_position
from vllm_diffusion.constrain.rewrite import BadWords, Rewrite, Slack
from vllm_diffusion.constrain.stacking import NO_CONSTRAINTS, Stacked, Stacking
from vllm_diffusion.constrain.words import (
    UNKNOWN,
    completing_ids,
    forbidden_ids,
    output_before,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.constrain.constraints import Constraints
    from vllm_diffusion.records import CanvasBatch


class ConstraintTable:
    """Constraints by slot; ``admit`` overwrites whatever the slot's last owner asked for."""

    def __init__(self, *, canvas_length: int, vocab_size: int, device: torch.device) -> None:
        self._stacking = Stacking(canvas_length=canvas_length, vocab_size=vocab_size, device=device)
        self._owners: dict[int, tuple[Constraints, int]] = {}
        self._seen: tuple[tuple[int, ...], Stacked] | None = None

    def admit(self, slot: int, constraints: Constraints, *, prompt_length: int) -> None:
        """Give the slot's canvases to a request."""
        self._seen = None
        self._owners.pop(slot, None)
        if constraints != NO_CONSTRAINTS:
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
        known: Tensor | None = None,
    ) -> Rewrite | None:
        """What the requests of a batch change, or None where nobody asks for anything.

        Args:
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
            text: [S, N] int, prompt and committed tokens of every slot, N at least the longest.
            argmax: [S, L] int64, of every slot's last step.
            step: [S] int64, steps taken on every slot's canvas.
            known: [B, L] int64, tokens that stay, -1 where a canvas holds noise; None where nothing
                stays before a canvas is finished.
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
                    revealed=None if known is None else self._output(stacked, batch, known),
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
            if known is not None:
                forbidden.append(completing_ids(words, torch.where(known < 0, UNKNOWN, known)))
            else:
                guessed = step[batch.slots][:, None] > 0
                guess = torch.where(guessed, argmax[batch.slots], UNKNOWN)
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

    @staticmethod
    def _output(stacked: Stacked, batch: CanvasBatch, known: Tensor) -> Tensor:
        """The known tokens that are part of the answer; a suffix, say, is not."""
        if stacked.holes is None:
            return known
        behind = stacked.prompt_length + stacked.holes[0]
        return known.masked_fill(batch.position >= behind[:, None], -1)

    def first_input(self, slots: Sequence[int], position: Tensor) -> tuple[Tensor, Tensor] | None:
        """How canvases that begin differ from noise at the first step; None if none does.

        Args:
            slots: B slots, on the host.
            position: [B, L] int64, absolute.

        Returns:
            Their tokens, [B, L] int64, -1 where noise stays; the step they begin at, [B] int64.
        """
        owners = [self._owners.get(slot, (NO_CONSTRAINTS, 0)) for slot in slots]
        if not any(mine.seed_canvas for mine, _ in owners):
            return None
        prompt_length = self._stacking.tensor([length for _, length in owners])
        seeds = self._stacking.lists([mine.seed_canvas for mine, _ in owners])
        step = self._stacking.tensor([mine.first_step or 0 for mine, _ in owners])
        behind = self._stacking.tensor([length + len(mine.seed_canvas) for mine, length in owners])
        return (
            by_position(seeds, prompt_length, position),
            torch.where(position[:, 0] < behind, step, 0),
        )

    def has_draft(self, slots: Sequence[int]) -> bool:
        """Whether the seed canvas of some slot may reach canvases behind the first one."""
        owners = (self._owners[slot][0] for slot in slots if slot in self._owners)
        return any(mine.first_step is not None for mine in owners)

    def _stack(self, slots: tuple[int, ...]) -> Stacked:
        if self._seen is None or self._seen[0] != slots:
            owners = [self._owners.get(slot, (NO_CONSTRAINTS, 0)) for slot in slots]
            asked, prompt_lengths = zip(*owners, strict=True)
            self._seen = slots, self._stacking.stacked(asked, prompt_lengths)
        return self._seen[1]
