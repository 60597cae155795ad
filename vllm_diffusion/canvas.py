"""CanvasPool: the device state of every canvas, one row a slot, and the life of a row.

    admit -> begin -> (advance)* -> finish -> commit -> begin ...  -> admit (the slot's next owner)
    admit -> begin -> (advance)* -> finish, begin ...                 a fused slot

A slot is causal while its rows write the KV of known text (prompt, or a finished canvas being
committed) and bidirectional while its canvas is denoised. A fused slot gives the tokens of a canvas
in the step that finishes it, and its next canvas begins at once: the rows that write the KV of the
finished one are text that the engine runs beside the next, see ``engine.fusion``. Nothing here
reads a tensor back to the host: which slots finish or commit is data, selected with ``where``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.denoise.constants import ConstantTable
from vllm_diffusion.denoise.noise import UniformNoise
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.records import (
    CanvasBatch,
    CanvasStats,
    Decision,
    Emission,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.denoise.constants import RuleConstants
    from vllm_diffusion.denoise.noise import CanvasNoise


class CanvasPool:
    """Per-slot tensors, allocated once.

    Attributes (S slots, L canvas length, K steps remembered, H hidden size):
        tokens: [S, L] int64, input of the next forward: the noisy canvas, or the finished one.
        argmax: [S, L] int64, the model's best guess after the last step.
        top_prob: [S, L] fp32, its probability; 0 before the first step of a canvas.
        history: [S, K, L] int64, argmax of the previous K steps, oldest first, -1 before any.
        soft_embedding: [S, L, H] model dtype, self-conditioning input of the next step; None where
            the model is not conditioned on itself.
        step: [S] int64, where the current canvas is in its schedule, 0 to ``max_steps``.
        first_step: [S] int64, where it began: above 0 if it began from a draft.
        count: [S] int64, tokens a finished canvas commits; rows: [S, L] int64, the row that each of
            them comes from. Both are read from its last step to its commit alone.
        reason: [S] int64, what the last step named as a ``StopReason``.
        entropy: [S] fp32, nats, mean entropy of the canvas in the last step.
        causal: [S] bool, the slot's next rows are prompt or commit rows.
        fused: [S] bool, canvases give their tokens in their last step, and are never committed
            by themselves.
        seed: [S, 2] int64, words of the request seed.
        constants: [S] each, the constants of the slots' rules.
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
        self.argmax = integers(canvas_length)
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
        self.constants = ConstantTable(constants, num_slots=num_slots, device=device)
        self.owners: dict[int, RuleConstants] = {}

    def out_of_steps(self, slots: Tensor) -> Tensor:
        """[B] bool, whether this step is the last one that the slots' canvases may take."""
        return self.step[slots] + 1 >= self.constants.max_steps[slots]

    def admit(
        self,
        slot: int,
        *,
        seed: int,
        constants: RuleConstants | None = None,
        fused: bool = False,
    ) -> None:
        """Give a slot to a request; its rows are causal until ``begin``.

        Everything the previous owner left behind that a later step could read is overwritten here
        or in ``begin``, so an aborted request cannot leak into the next one.

        Args:
            slot: which row.
            seed: key of the request's noise, 64 bits.
            constants: the rule this request asked for, its stability at most what is remembered;
                None for the pool's own.
            fused: its canvases give their tokens in their last step.
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

    def release(self, slot: int) -> None:
        """Its owner is gone: its next rows, if any, are a prompt's, and it asks for nothing."""
        self.causal[slot].fill_(True)
        self.owners.pop(slot, None)

    def begin(self, slots: Tensor, position: Tensor) -> None:
        """Start a canvas whose first row stands at an absolute position.

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
        """Let canvases that have just begun start from given tokens and within their schedule.

        Args:
            slots: [B] int64.
            begun: [B] bool, those that have just begun; nothing else changes.
            tokens: [B, L] int64, -1 keeps the noise.
            step: [B] int64, below ``max_steps``.
        """
        given = begun[:, None] & (tokens >= 0)
        self.tokens[slots] = torch.where(given, tokens, self.tokens[slots])
        self.step[slots] = torch.where(begun, step, self.step[slots])
        self.first_step[slots] = torch.where(begun, step, self.first_step[slots])

    def apply(self, batch: CanvasBatch, stats: CanvasStats, decision: Decision) -> Emission:
        """Move every canvas of the batch one step on.

        A denoising slot takes the decision and, when finished, turns causal with what it commits
        as the next input, which the decision says. A committing slot emits that and
        begins the next canvas behind it; a fused slot does so in the step that finishes. All of it
        is computed for every row and selected, so the host never waits.
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
        # What a separate commit emits was settled one forward ago and has waited in the pool.
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
        )

        tokens = decision.next_tokens
        # Most steps emit nothing. Only where state lives on the host is it free to look.
        if emits.device.type != "cpu" or emits.any():
            behind = batch.position + emission.count[:, None]
            next_canvas = self.noise.initial(self.seed[slots], behind)
            tokens = torch.where(emits[:, None], next_canvas, tokens)
        self.tokens[slots] = torch.where(waits[:, None], commit.tokens, tokens)
        self.count[slots] = asked
        self.rows[slots] = self._own_rows if commit.rows is None else commit.rows
        self.argmax[slots] = argmax
        self._remember(slots, argmax, stats.top_prob, emits)

        self._carry_over(slots, stats.soft_embedding, goes_on=~(committing | finished))
        # What a committing slot holds here has just been emitted.
        self.reason[slots], self.entropy[slots] = decision.reason, entropy
        self.step[slots] = torch.where(emits, 0, self.step[slots] + 1)
        self.first_step[slots] = torch.where(emits, 0, self.first_step[slots])
        self.causal[slots] = waits
        return emission

    def _carry_over(self, slots: Tensor, belief: Tensor | None, *, goes_on: Tensor) -> None:
        """Keep the soft embeddings of canvases that go on for their next step.

        A finished canvas is committed with plain embeddings, and a new one starts from zero. A
        value that is no number must not get into the KV cache: whoever is given its pages next
        would read it there.
        """
        if self.soft_embedding is None or belief is None:
            return
        carried = torch.where(goes_on[:, None, None] & belief.isfinite(), belief, 0)
        self.soft_embedding[slots] = carried.to(self.soft_embedding.dtype)

    def _remember(self, slots: Tensor, argmax: Tensor, top_prob: Tensor, emits: Tensor) -> None:
        """Shift the history of the slots by one step, forget that of a canvas that is over."""
        self.top_prob[slots] = torch.where(emits[:, None], 0.0, top_prob)
        if self.history.shape[1] == 0:
            return
        shifted = torch.cat([self.history[slots, 1:], argmax[:, None]], dim=1)
        self.history[slots] = torch.where(emits[:, None, None], -1, shifted)


def pool_class(device_type: str) -> type[CanvasPool]:
    """The form of the pool that suits the device: kernels on a GPU, the definition elsewhere."""
    if device_type != "cuda":
        return CanvasPool
    # Elsewhere there may be no Triton.
    kernels: type[CanvasPool] = import_module("vllm_diffusion.canvas_kernels").CanvasPoolKernels
    return kernels
