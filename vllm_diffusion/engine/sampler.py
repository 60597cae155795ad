"""CanvasSampler: vLLM's sampler call around ``step.advance``.

Takes hidden rows (the model returns them in place of logits). Returns to vLLM, per request, the
number of tokens gained and the number of rows that do not count as computed:

    prompt rows       gained 0, all count          -> the last chunk begins a canvas
    canvas rows       gained 0, none counts        -> the same positions run again next step
    commit rows       gained the committed tokens, which count
                                                   -> the next canvas begins after them

Where text is not causal fewer rows count, and those of a horizon never do, see ``grid``.

With fused commits no canvas row ever counts. The step that finishes a canvas gains its tokens and
begins the next canvas. The finished canvas's rows then return as text rows, which count and need
nothing from the sampler. Under asynchronous scheduling only the slot's state tells that returning
rows are text, see ``engine.fusion``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.canvases import canvases_of, step_output
from vllm_diffusion.engine.granted import granted_rows, settle
from vllm_diffusion.engine.step_rows import StepRows
from vllm_diffusion.family import Text
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.records import Noise
from vllm_diffusion.step import advance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from vllm.sampling_params import SamplingParams
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.constrain.automaton.slots import AutomatonSlots
    from vllm_diffusion.constrain.guard import Guards
    from vllm_diffusion.constrain.table import ConstraintTable
    from vllm_diffusion.engine.account import Account
    from vllm_diffusion.engine.logprobs import CanvasLogprobs
    from vllm_diffusion.engine.step_rows import GrantedRows
    from vllm_diffusion.family import CanvasModel, Family
    from vllm_diffusion.head import Head
    from vllm_diffusion.records import CanvasBatch, Emission
    from vllm_diffusion.rules.rule import Rule
    from vllm_diffusion.step import Observer


class CanvasSampler:
    """Denoises the canvases of a step and accounts for them.

    ``rule`` and ``observe`` go to ``step.advance`` and may be set on a running engine.
    """

    # The runner reads the bin counts after every step; None means that there are none to update.
    penalties_state: Final = SimpleNamespace(output_bin_counts=None)

    def __init__(
        self,
        family: Family,
        model: CanvasModel,
        pool: CanvasPool,
        head: Head,
        rule: Rule,
        req_states: RequestState,
        constraints: ConstraintTable,
        automata: AutomatonSlots,
        guards: Guards,
        logprobs: CanvasLogprobs,
        head_bytes: int,
        account: Account | None,
        foreseen: bool = False,
    ) -> None:
        self.family = family
        self.model = model
        self.pool = pool
        self.head = head
        self.rule = rule
        self.req_states = req_states
        self.constraints = constraints
        self.automata = automata
        self.guards = guards
        self.logprobs = logprobs
        self.head_bytes = head_bytes
        self.account = account
        self.foreseen = foreseen
        self.reuses = torch.zeros_like(pool.causal)
        self.widest = torch.full_like(pool.step, pool.canvas_length)
        self.observe: Observer | None = None

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> None:
        """Take in what concerns rows beside the canvas; the model state does everything else."""
        if self.family.text is Text.WHOLE:
            asked = carriers.admitted(sampling_params, self.pool.default)
            self.reuses[req_idx].fill_(asked.approximate_prefix)
            self.widest[req_idx].fill_(asked.canvas_length or self.pool.canvas_length)
        if self.family.horizon:
            # A step writes what the canvas drafts and nothing behind it.
            self.req_states.draft_tokens[req_idx] = self.family.mask_id

    def apply_staged_writes(self) -> None:
        """Does nothing: no writes are staged."""

    def __call__(
        self,
        hidden: Tensor,
        input_batch: InputBatch,
        draft_logits: Any = None,
    ) -> SamplerOutput:
        """Advance every canvas of the batch by one step.

        Args:
            hidden: [R, H], final hidden states of the rows with logits, request by request.
            input_batch: the step's batch.
            draft_logits: unused.
        """
        del draft_logits
        self.model.sampler_takes_hidden = False
        num_reqs = input_batch.num_reqs
        rows = StepRows(
            slots=input_batch.idx_mapping,
            seq_lens=input_batch.seq_lens,
            first=input_batch.cu_num_logits,
            text_end=self.req_states.prefill_len.gpu,
            widest=self.widest,
            reuses=self.reuses,
        )
        if hidden.shape[0] and not input_batch.num_draft_tokens:
            self._run_widest_head(hidden)
        widths = np.diff(input_batch.cu_num_logits_np[: num_reqs + 1])
        if not input_batch.num_draft_tokens:
            widths = np.zeros_like(widths)
        if self.account is not None:
            self.account.check(input_batch, widths)
        emission = scored = granted = None
        if self.foreseen:
            granted = granted_rows(self.pool, input_batch, widths)
        if widths.any():
            emission, scored = self._advance(hidden, input_batch, rows, widths, granted)
        # Text that shares a block with a canvas runs in every step of it: only rows without a
        # canvas can be the last of a prompt.
        prompt = input_batch.is_prefilling_np[:num_reqs] & (widths == 0)
        self._begin_after_prompt(input_batch, prompt)
        step = step_output(self.family, self.pool, rows, emission, self.req_states.draft_tokens)
        if granted is not None and emission is not None:
            settle(granted, self.pool, emission, step.rejected, self.req_states.draft_tokens)
        output = SamplerOutput(
            sampled_token_ids=step.tokens,
            logprobs_tensors=scored,
            num_nans=None,
            num_sampled=step.gained,
            num_rejected=step.rejected,
        )
        carriers.put_committed(output, step.committed)
        return output

    def _advance(
        self,
        hidden: Tensor,
        input_batch: InputBatch,
        rows: StepRows,
        widths: np.ndarray,
        granted: GrantedRows | None,
    ) -> tuple[Emission, LogprobsTensors | None]:
        """Advance the canvases of the step; return their emission and log-probabilities.

        Args:
            hidden: [R, H].
            input_batch: the step's batch.
            rows: the same on the device.
            widths: [N], rows of every request's canvas and horizon, 0 for none.
            granted: what the rows are, if only the device knows.
        """
        decoding = np.flatnonzero(widths)
        length = self.pool.canvas_length
        batch, places = canvases_of(rows, count=decoding.size, length=length)
        batch = batch if granted is None else granted.placed(batch)
        running = input_batch.idx_mapping_np[: widths.size]
        slots = running[decoding].tolist()
        # Rows come canvas by canvas; if all are full width there is nothing to gather.
        full = bool((widths[decoding] == length).all())
        canvases = hidden.reshape(*places.shape, -1) if full else hidden[places]
        rewrite = None
        if self.constraints.concern(slots):
            rewrite = self.constraints.rewrite(
                slots,
                batch,
                text=self._text(
                    input_batch.num_computed_tokens_np[decoding]
                    + input_batch.num_scheduled_tokens[decoding]
                    - widths[decoding]
                ),
                argmax=self.pool.argmax,
                step=self.pool.step - self.pool.first_step,
                known=self.pool.known(batch.slots),
            )
        ran = batch if granted is None else granted.begin(self.pool, batch)
        emission = advance(
            self.pool,
            ran,
            canvases,
            self.head,
            self.rule,
            rewrite=rewrite,
            automata=self.automata.canvases(slots, batch),
            guards=self.guards.of(slots),
            observe=self.observe,
        )
        self.automata.advance(slots, batch, emission)
        scored = self.logprobs.leaving(
            np.where(widths, running, -1).tolist(),
            slots,
            ran,
            canvases,
            emission,
            pool=self.pool,
            head=self.head,
        )
        self._begin_behind_commit(slots, batch, emission)
        return emission, scored

    def _begin_after_prompt(self, input_batch: InputBatch, prompt: np.ndarray) -> None:
        """Begin the first canvas of requests whose last prompt chunk has just run."""
        computed = (
            input_batch.num_computed_prefill_tokens_np[: prompt.size]
            + input_batch.num_scheduled_tokens[: prompt.size]
        )
        done = np.flatnonzero(prompt & (computed >= input_batch.prefill_len_np[: prompt.size]))
        if done.size:
            index, start = self._to_device(np.stack([done, input_batch.prefill_len_np[done]]))
            offset = torch.arange(self.pool.canvas_length, device=start.device)
            slots, position = input_batch.idx_mapping[index], start[:, None] + offset
            self.pool.begin(slots, position)
            owners = input_batch.idx_mapping_np[done].tolist()
            self._begin_from(owners, slots, position, torch.ones_like(slots, dtype=torch.bool))

    def _begin_behind_commit(
        self, owners: Sequence[int], batch: CanvasBatch, emission: Emission
    ) -> None:
        """Give canvases that begin after an emitted one their part of a long draft."""
        # Most steps emit nothing, but only on a CPU can this be tested without a device sync.
        if emission.count.device.type == "cpu" and not emission.count.any():
            return
        if self.constraints.has_draft(owners):
            behind = batch.position + emission.count[:, None]
            self._begin_from(owners, batch.slots, behind, emission.count > 0)

    def _begin_from(
        self, owners: Sequence[int], slots: Tensor, position: Tensor, begun: Tensor
    ) -> None:
        first = self.constraints.first_input(owners, position)
        if first is not None:
            self.pool.begin_from(slots, begun, *first)

    def _text(self, computed: np.ndarray) -> Tensor:
        """[S, N], prompt and committed tokens of every slot, N enough for the slots of the step.

        Args:
            computed: upper bounds of the tokens before the canvases of the step.
        """
        return self.req_states.all_token_ids.gpu[:, : max(1, int(computed.max()))]

    def _run_widest_head(self, hidden: Tensor) -> None:
        """Run the head at full size in vLLM's memory profile, whose batch has no canvases."""
        # On a CPU host memory is not planned by this profile, and a full batch would take seconds.
        on_host = hidden.device.type == "cpu"
        canvases = 1 if on_host else self.pool.num_slots - 1
        # Requests with a cut use all the memory the head may take, so these rows have one.
        reserved = hidden.new_empty(0 if on_host else self.head_bytes, dtype=torch.uint8)
        states = hidden[:1].expand(canvases * self.pool.canvas_length, -1)
        counter = torch.zeros(states.shape[0], dtype=torch.int64, device=states.device)
        noise = Noise(seed=counter[:, None].expand(-1, 2), position=counter, step=counter)
        temperature = torch.ones_like(counter, dtype=torch.float32)
        masked = self.family.mask_id is not None  # then a rule may ask for probabilities
        self.head(
            Rows(
                hidden=states,
                temperature=temperature,
                noise=noise,
                self_conditioning=self.pool.soft_embedding is not None,
                sample_prob=masked,
                own_prob=masked,
            )
        )
        del reserved

    def _to_device(self, values: np.ndarray) -> Tensor:
        return async_tensor_h2d(values.astype(np.int64), device=self.pool.device)
