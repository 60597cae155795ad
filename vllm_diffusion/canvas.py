"""CanvasPool: the device state of every canvas, one row per slot, and the life cycle of a slot.

    admit -> begin -> (advance)* -> finish -> commit -> begin ...  -> admit (the slot's next owner)
    admit -> begin -> (advance)* -> finish, begin ...                 a fused slot

A slot is causal while its rows write the KV of known text (a prompt, or a finished canvas being
committed) and bidirectional while its canvas is denoised. A fused slot emits the tokens of a canvas
in the step that finishes it and begins the next canvas at once. The engine then runs the rows that
write the finished canvas's KV as text beside the next canvas, see ``engine.fusion``. Nothing here
reads a tensor back to the host: which slots finish or commit is data, selected with ``where``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.denoise.constants import declared
from vllm_diffusion.denoise.noise import AbsorbingNoise, UniformNoise
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.records import (
    CanvasBatch,
    CanvasStats,
    Decision,
    Emission,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from vllm_diffusion.denoise.constants import RuleConstants
    from vllm_diffusion.denoise.noise import CanvasNoise


MOST_ENDS: Final = 4
"""Ids of a request that end a canvas early; an answer that ends with another one takes longer."""


class ConstantTable:
    """The constants of every slot: one tensor [S] per constant, an attribute by its name."""

    def __init__(self, constants: RuleConstants, *, num_slots: int, device: torch.device) -> None:
        self._tensors: dict[str, Tensor] = {
            name: torch.full(
                (num_slots,),
                constant.held(getattr(constants, name)),
                dtype=constant.dtype,
                device=device,
            )
            for name, constant in declared(type(constants)).items()
        }

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise AttributeError(name) from None

    def put(self, slot: int, constants: RuleConstants) -> None:
        """Write a slot's constants without a device sync."""
        for name, constant in declared(type(constants)).items():
            self._tensors[name][slot].fill_(constant.held(getattr(constants, name)))


class CanvasPool:
    """Per-slot tensors, allocated once.

    Attributes (S slots, L canvas length, K steps remembered, H hidden size):
        tokens: [S, L] int64, input of the next forward: the noisy canvas, or the finished canvas.
        argmax: [S, L] int64, the most probable tokens of the last step; on absorbing noise it is
            ``tokens``, the same tensor: what has been revealed, between masks.
        top_prob: [S, L] fp32, their probability; 0 before the first step of a canvas.
        history: [S, K, L] int64, argmax of the previous K steps, oldest first, -1 before any.
        soft_embedding: [S, L, H] model dtype, self-conditioning input of the next step; None for
            models without self-conditioning.
        step: [S] int64, position of the current canvas in its schedule, 0 to ``max_steps``.
        first_step: [S] int64, the step it began at; above 0 if it began from a draft.
        count: [S] int64, number of tokens a finished canvas commits; rows: [S, L] int64, the canvas
            row of each. Both are valid only from a canvas's last step to its commit.
        reason: [S] int64, the ``StopReason`` of the last step.
        entropy: [S] fp32, nats, mean entropy of the canvas in the last step.
        causal: [S] bool, the slot's next rows are prompt or commit rows.
        fused: [S] bool, the slot's canvases emit their tokens in their last step and have no
            separate commit.
        seed: [S, 2] int64, words of the request seed.
        ends: [S, E] int64, ids that end the request's answer, -1 pads: a canvas that has one before
            every mask is finished. None for noise that is not absorbing.
        constants: the rules' constants, one [S] tensor each.
        owners: on the host, the constants of every slot that has an owner.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        canvas_length: int,
        hidden_size: int | None,
        vocab_size: int,
        constants: RuleConstants,
        noise: CanvasNoise | None = None,
        remembered: int | None = None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.canvas_length = canvas_length
        self.vocab_size = vocab_size
        self.noise: CanvasNoise = noise or UniformNoise(vocab_size)
        self.default = constants
        self.device = device

        def integers(*shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=torch.int64, device=device)

        self.tokens = integers(canvas_length)
        self.argmax = integers(canvas_length) if self.mask_id is None else self.tokens
        self.top_prob = torch.zeros(num_slots, canvas_length, device=device)
        steps = constants.remembered if remembered is None else remembered
        self.history = integers(steps, canvas_length)
        self.soft_embedding = (
            None
            if hidden_size is None
            else torch.zeros(num_slots, canvas_length, hidden_size, dtype=dtype, device=device)
        )
        self.step = integers()
        self.first_step = integers()
        self.count = integers()
        self.rows = integers(canvas_length)
        self._own_rows = torch.arange(canvas_length, device=device)
        self.reason = integers()
        self.entropy = torch.zeros(num_slots, device=device)
        self.causal = torch.ones(num_slots, dtype=torch.bool, device=device)
        self.fused = torch.zeros_like(self.causal)
        self.seed = integers(2)
        self.ends = None if self.mask_id is None else integers(MOST_ENDS).fill_(-1)
        self.constants = ConstantTable(constants, num_slots=num_slots, device=device)
        self.owners: dict[int, RuleConstants] = {}

    @property
    def mask_id(self) -> int | None:
        """The token of absorbing noise, which is revealed and then stays; None for other noise."""
        return self.noise.mask_id if isinstance(self.noise, AbsorbingNoise) else None

    def known(self, slots: Tensor) -> Tensor | None:
        """[B, L] int64, the tokens that canvases hold for good, -1 where they hold noise.

        None on noise that looks like any token: nothing is known before a canvas is finished.
        """
        if self.mask_id is None:
            return None
        tokens = self.tokens[slots]
        return tokens.masked_fill(tokens == self.mask_id, -1)

    def out_of_steps(self, slots: Tensor) -> Tensor:
        """[B] bool, whether this step is the last that the schedule of each canvas allows."""
        return self.step[slots] + 1 >= self.constants.max_steps[slots]

    def admit(
        self,
        slot: int,
        *,
        seed: int,
        constants: RuleConstants | None = None,
        fused: bool = False,
        ends: Sequence[int] = (),
    ) -> None:
        """Give a slot to a request; its rows are causal until ``begin``.

        All state of the previous owner that a later step could read is overwritten here or in
        ``begin``, so an aborted request cannot leak into the next.

        Args:
            slot: index of the slot.
            seed: key of the request's noise, 64 bits.
            constants: constants of the request's rule; its stability threshold must not exceed the
                steps of ``history``. None for the pool's default.
            fused: whether its canvases emit their tokens in their last step.
            ends: ids behind which nothing of its answer is read, see ``ends``.
        """
        rule = constants or self.default
        low, high = split_seed(seed)
        self.seed[slot, 0].fill_(low)
        self.seed[slot, 1].fill_(high)
        self.constants.put(slot, rule)
        self.owners[slot] = rule
        self.step[slot].fill_(0)
        self.first_step[slot].fill_(0)
        self.causal[slot].fill_(True)
        self.fused[slot].fill_(fused)
        if self.ends is not None:
            padded = [*ends, *[-1] * MOST_ENDS][:MOST_ENDS]
            for place, token in enumerate(padded):
                self.ends[slot, place].fill_(token)

    def release(self, slot: int) -> None:
        """Take the slot from its owner: its next rows are prompt rows, with no constants set."""
        self.causal[slot].fill_(True)
        self.owners.pop(slot, None)

    def begin(self, slots: Tensor, position: Tensor) -> None:
        """Start new canvases at the given positions, filled with noise.

        Args:
            slots: [B] int64.
            position: [B, L] int64, absolute positions of the new canvas.
        """
        self.tokens[slots] = self.noise.initial(self.seed[slots], position)
        self.history[slots] = -1
        self.top_prob[slots] = 0
        if self.soft_embedding is not None:
            self.soft_embedding[slots] = 0
        self.step[slots] = 0
        self.first_step[slots] = 0
        self.causal[slots] = False

    def begin_from(self, slots: Tensor, begun: Tensor, tokens: Tensor, step: Tensor) -> None:
        """Set the tokens and the first step of canvases that have just begun.

        Args:
            slots: [B] int64.
            begun: [B] bool, canvases that have just begun; the others do not change.
            tokens: [B, L] int64, -1 keeps the noise.
            step: [B] int64, first step, below ``max_steps``.
        """
        given = begun[:, None] & (tokens >= 0)
        self.tokens[slots] = torch.where(given, tokens, self.tokens[slots])
        self.step[slots] = torch.where(begun, step, self.step[slots])
        self.first_step[slots] = torch.where(begun, step, self.first_step[slots])

    def apply(self, batch: CanvasBatch, stats: CanvasStats, decision: Decision) -> Emission:
        """Advance every canvas of the batch by one step.

        A denoising slot applies the decision. Once finished it turns causal, and the tokens to
        commit become its next input. A committing slot emits them and begins the next canvas after
        them; a fused slot does both in the step that finishes. Every case is computed for every row
        and selected afterwards, so the host never waits.
        """
        slots = batch.slots
        committing = self.causal[slots]
        row_committing = committing[:, None]
        finished = decision.finished & ~committing
        fused = finished & self.fused[slots]
        emits, waits = committing | fused, finished & ~fused

        argmax = torch.where(row_committing, self.argmax[slots], stats.argmax)
        commit = decision.commit
        entropy = torch.where(batch.valid, stats.entropy, 0.0).sum(1) / batch.width
        # A separate commit emits what was decided one forward ago and has been kept in the pool.
        taken = self.step[slots] - self.first_step[slots] + fused.long()
        asked = batch.width if commit.count is None else commit.count
        count = torch.where(committing, self.count[slots], asked)
        if batch.idle is not None:
            count = count.masked_fill(batch.idle, 0)
        emission = Emission(
            tokens=torch.where(row_committing, self.tokens[slots], commit.tokens),
            count=torch.where(emits, count, 0),
            steps=torch.where(emits, taken, 0),
            reason=torch.where(committing, self.reason[slots], decision.reason),
            entropy=torch.where(committing, self.entropy[slots], entropy),
            revealed=self._revealed(batch, decision.accept & ~row_committing),
        )

        tokens = decision.next_tokens
        # Most steps emit nothing, but only on a CPU can this be tested without a device sync.
        if emits.device.type != "cpu" or emits.any():
            behind = batch.position + emission.count[:, None]
            next_canvas = self.noise.initial(self.seed[slots], behind)
            tokens = torch.where(emits[:, None], next_canvas, tokens)
        self.tokens[slots] = torch.where(waits[:, None], commit.tokens, tokens)
        self.count[slots] = asked
        self.rows[slots] = self._own_rows if commit.rows is None else commit.rows
        if self.mask_id is None:
            self.argmax[slots] = argmax
        self._remember(slots, argmax, stats.top_prob, emits)

        self._carry_over(slots, stats.soft_embedding, goes_on=~(committing | finished))
        # The previous values of a committing slot have just been emitted.
        self.reason[slots], self.entropy[slots] = decision.reason, entropy
        self.step[slots] = torch.where(emits, 0, self.step[slots] + 1)
        self.first_step[slots] = torch.where(emits, 0, self.first_step[slots])
        self.causal[slots] = waits
        return emission

    def _revealed(self, batch: CanvasBatch, accept: Tensor) -> Tensor | None:
        """See ``Emission.revealed``."""
        if self.mask_id is None:
            return None
        return accept if batch.idle is None else accept & ~batch.idle[:, None]

    def _carry_over(self, slots: Tensor, soft: Tensor | None, *, goes_on: Tensor) -> None:
        """Keep the soft embeddings of canvases that continue, for their next step.

        A finished canvas is committed with plain embeddings and a new one starts from zero. NaN and
        infinity must not enter the KV cache: the next owner of those pages would read them.
        """
        if self.soft_embedding is None or soft is None:
            return
        carried = torch.where(goes_on[:, None, None] & soft.isfinite(), soft, 0)
        self.soft_embedding[slots] = carried.to(self.soft_embedding.dtype)

    def _remember(self, slots: Tensor, argmax: Tensor, top_prob: Tensor, emits: Tensor) -> None:
        """Append a step to the history of the slots, or clear it where the canvas has ended."""
        self.top_prob[slots] = torch.where(emits[:, None], 0.0, top_prob)
        if self.history.shape[1] == 0:
            return
        shifted = torch.cat([self.history[slots, 1:], argmax[:, None]], dim=1)
        self.history[slots] = torch.where(emits[:, None, None], -1, shifted)


def pool_class(device_type: str) -> type[CanvasPool]:
    """The pool implementation for a device: Triton kernels on a GPU, plain torch elsewhere."""
    if device_type != "cuda":
        return CanvasPool
    # Imported here because other hosts may have no Triton.
    kernels: type[CanvasPool] = import_module("vllm_diffusion.canvas_kernels").CanvasPoolKernels
    return kernels
