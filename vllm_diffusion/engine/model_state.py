"""CanvasModelState: vLLM's hooks around a forward, for models that denoise canvases.

add_request      a slot of the canvas pool gets its owner
prepare_attn     which rows are causal and which are canvas rows
prepare_inputs   embeddings; canvas rows pass through self-conditioning
(forward)
custom_sampler   the sampler that denoises (``engine.sampler``)
"""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.worker.gpu.model_states.interface import ModelState

from vllm_diffusion.canvas import pool_class
from vllm_diffusion.config import HEAD_WEIGHTS
from vllm_diffusion.constrain.automaton.record import TokenAutomaton
from vllm_diffusion.constrain.automaton.slots import AutomatonSlots
from vllm_diffusion.constrain.guard import Guards
from vllm_diffusion.constrain.table import ConstraintTable
from vllm_diffusion.denoise.draft import seed_canvas_from_draft
from vllm_diffusion.denoise.noise import noise_of
from vllm_diffusion.denoise.rng import request_seed
from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.account import Account
from vllm_diffusion.engine.constraints.compiler import guard_of, parsers_of
from vllm_diffusion.engine.fusion import Fusion
from vllm_diffusion.engine.granted import place_rows
from vllm_diffusion.engine.inputs import CanvasInputs
from vllm_diffusion.engine.logprobs import CanvasLogprobs
from vllm_diffusion.engine.sampler import CanvasSampler
from vllm_diffusion.engine.step_attention import StepAttention
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Conditioning
from vllm_diffusion.head.reference import COPIES, ReferenceHead
from vllm_diffusion.head.stream import StreamingHead
from vllm_diffusion.request.sampling import constraints, ends, noise_seed
from vllm_diffusion.rules import rule_for
from vllm_diffusion.trace.record import Recorder, trace_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.core.sched.output import NewRequestData
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
    from vllm.v1.worker.gpu.states import RequestState
    from vllm.v1.worker.utils import AttentionGroup

    from vllm_diffusion.family import SelfConditionedModel
    from vllm_diffusion.head import Head


class CanvasModelState(ModelState):
    """Worker-side state of a diffusion model: the canvas pool and the inputs of every forward."""

    # A denoising step samples no token beyond the canvas itself.
    num_new_sampled_tokens_per_step: ClassVar[int] = 0

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        text_config = self.model_config.hf_text_config
        self._served = carriers.served(self.model_config.hf_config)
        self.family, self.rules = self._served.family, self._served.rules
        conditioned = self.family.conditioning is Conditioning.SELF
        self.pool = pool_class(device.type)(
            num_slots=self.max_num_reqs + 1,  # the last has no owner, see ``GrantedRows``
            canvas_length=self._served.canvas_length,
            hidden_size=text_config.hidden_size if conditioned else None,
            vocab_size=self.model_config.get_vocab_size(),
            constants=self.rules.default,
            noise=noise_of(self.family.mask_id, self.model_config.get_vocab_size()),
            remembered=self.rules.remembered,
            dtype=self.dtype,
            device=device,
        )
        self.pool.admit(self.max_num_reqs, seed=0)
        self.constraints = ConstraintTable(
            canvas_length=self.pool.canvas_length,
            vocab_size=self.pool.vocab_size,
            device=device,
        )
        self.automata = AutomatonSlots(num_slots=self.max_num_reqs, device=device)
        self.guards = Guards()
        self._fusion = Fusion.of(vllm_config, self.family)
        self._account = Account(
            self.family,
            slots=self.max_num_reqs,
            width=self.pool.canvas_length,
            end=self.max_model_len,
        )
        self.logprobs = CanvasLogprobs(raw_logits=self.model_config.logprobs_mode == "raw_logits")
        self._slot_of: dict[str, int] = {}
        self._recorder = self._make_recorder()
        self._attention = StepAttention(
            vllm_config,
            self.family,
            self.pool,
            self._fusion,
            slots=self.max_num_reqs,
            max_tokens=self.max_num_tokens,
            max_span=text_config.sliding_window if self.supports_mm_inputs else 0,
        )
        self._inputs = (
            CanvasInputs(
                cast("SelfConditionedModel", model), self.pool, max_tokens=self.max_num_tokens
            )
            if conditioned
            else None
        )

    def get_additional_cg_support(self) -> tuple[AttentionCGSupport, str | None]:
        """Which batches may run as one captured graph, see ``StepAttention``."""
        return self._attention.cudagraph_support()

    def get_supported_generation_tasks(self) -> tuple[str, ...]:
        """Text generation only."""
        return ("generate",)

    def custom_sampler(self, sampler: Any) -> tuple[CanvasSampler, None]:
        """Replace vLLM's sampler with the denoising one."""
        vocab_size = self.model_config.get_vocab_size()
        # Memory limit of a step's logits: all tiles of the streaming head, or all rows that the
        # reference head processes at once.
        budget = self._served.head_memory_mb * 2**20
        conditioned = self.family.conditioning is Conditioning.SELF
        whole = ReferenceHead(
            logits=self.model.logits,
            soft_embedding=self.model.soft_embedding if conditioned else None,
            max_rows=max(1, budget // (COPIES * 4 * vocab_size)),
            banned=self.family.banned,
        )
        head: Head = whole
        form = self._served.head_weights
        # A head that streams leaves out no ids, and gives no rule the probability of a sample.
        vocabulary = None if self.family.mask_id is not None else self.model.vocabulary()
        if vocabulary is not None:
            copied = vocabulary.copied(form)
            head = StreamingHead(vocabulary=copied, whole=whole, budget=budget)
        elif form is not None:
            raise ConfigError(
                f"{HEAD_WEIGHTS}={form} is not supported for this checkpoint, whose logits are "
                "computed as a whole: its head is quantised, or its family has a mask token. "
                "Remove it."
            )
        canvas_sampler = CanvasSampler(
            self.family,
            self.model,
            self.pool,
            head,
            rule_for(self.family, self.pool.noise, device_type=self.device.type),
            sampler.req_states,
            constraints=self.constraints,
            automata=self.automata,
            guards=self.guards,
            logprobs=self.logprobs,
            head_bytes=budget,
            account=None
            if self._fusion.foreseen or self._fusion.why_not is not None
            else self._account,
            foreseen=self._fusion.foreseen,
        )
        if self._recorder is not None:
            canvas_sampler.observe = self._recorder.observe
        return canvas_sampler, None

    def _make_recorder(self) -> Recorder | None:
        """The trace recorder if tracing is on; on one rank, since all ranks see the same."""
        folder = trace_folder(os.environ)
        if folder is None or get_tensor_model_parallel_rank() != 0:
            return None
        recorder = Recorder(folder, self.family)
        # At shutdown the runner drops the model state without calling any hook.
        weakref.finalize(self, recorder.close)
        return recorder

    # ---- life cycle of a request ----

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Give the request a slot; also called when a request returns after preemption."""
        sampling = new_req_data.sampling_params
        self._slot_of[new_req_data.req_id] = req_index
        admitted = carriers.admitted(sampling, self.rules.default)
        seed = request_seed(noise_seed(sampling), new_req_data.req_id)
        fused = self._fusion.holds_for(admitted.fused_commit)
        self.pool.admit(
            req_index,
            seed=seed,
            constants=admitted.rule,
            fused=fused,
            ends=ends(sampling, admitted),
        )
        asked, prompt_length = constraints(sampling, admitted), len(new_req_data.prompt_token_ids)
        self._account.admit(
            req_index,
            admitted.canvas_length,
            answer_end=prompt_length + admitted.answer_rows(sampling.max_tokens),
        )
        if admitted.noise_level is not None:
            seed_canvas, first_step = seed_canvas_from_draft(
                asked.seed_canvas,
                pinned=asked.pinned,
                level=admitted.noise_level,
                seed=seed,
                start=prompt_length,
                steps=admitted.rule.max_steps,
            )
            asked = replace(asked, seed_canvas=seed_canvas, first_step=first_step)
        self.constraints.admit(req_index, asked, prompt_length=prompt_length)
        self._admit_constraint(req_index, new_req_data)
        self.logprobs.admit(req_index, sampling, admitted)
        if self._recorder is not None:
            self._recorder.begin(
                self.pool,
                req_index,
                new_req_data.req_id,
                constraints=asked,
                prompt_length=prompt_length,
                guarded=bool(self.guards.of([req_index])),
            )

    def _admit_constraint(self, slot: int, new: NewRequestData) -> None:
        self.automata.release(slot)
        self.guards.release(slot)
        if (named := carriers.named_constraint(new)) is None:
            return
        prompt_length = len(new.prompt_token_ids)
        written = new.prefill_token_ids[prompt_length:]
        behind = min(prompt_length + new.sampling_params.max_tokens, self.max_model_len)
        if isinstance(named.kept, TokenAutomaton):
            self.automata.admit(slot, named.kept, name=named.name, output=written, behind=behind)
            return
        left = behind - prompt_length - len(written)
        tokenizer = cached_tokenizer_from_config(self.model_config)
        parsers = parsers_of(tokenizer, self.pool.vocab_size)
        guard = guard_of(
            named.kept, parsers, tokens_left=left, written=written, thinking=named.thinking
        )
        self.guards.admit(slot, guard)

    def remove_request(self, req_id: str) -> None:
        """Release the slot of a finished, aborted or preempted request."""
        slot = self._slot_of.pop(req_id, None)
        if slot is not None:
            self.pool.release(slot)
            self.automata.release(slot)
            self.guards.release(slot)
            self.logprobs.release(slot)
            if self._recorder is not None:
                self._recorder.end(slot)

    # ---- before a forward ----

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        for_capture: bool = False,
        ubatch_idx: int = 0,  # noqa: ARG002 - vLLM does not micro-batch diffusion
    ) -> dict[str, Any]:
        """Attention metadata by layer name: causal rows and canvas rows in one batch."""
        return self._attention.metadata(
            input_batch,
            block_tables,
            slot_mappings,
            attn_groups,
            kv_cache_config,
            spans=self._image_spans(input_batch),
            padded=cudagraph_mode == CUDAGraphMode.FULL,
            for_capture=for_capture,
        )

    def _image_spans(self, input_batch: InputBatch) -> list[list[tuple[int, int]]]:
        """Half-open absolute ranges that attend bidirectionally, per request of the batch."""
        if not (self.supports_mm_inputs and self.model_config.is_mm_prefix_lm):
            return [[] for _ in input_batch.req_ids]
        features = self.encoder_cache.mm_features
        return [
            sorted(
                (first, last + 1)
                for feature in (features.get(req_id, ()) if prefilling else ())
                for first, last in feature.mm_position.extract_embeds_range()
            )
            for req_id, prefilling in zip(
                input_batch.req_ids, input_batch.is_prefilling_np.tolist(), strict=False
            )
        ]

    def prepare_inputs_embeds(
        self,
        scheduled_encoder_inputs: dict[str, list[int]],
        input_batch: InputBatch,
        req_states: RequestState,
    ) -> None:
        """Run the vision tower where scheduled and keep the embeddings of this step's rows.

        Returns nothing: ``prepare_inputs`` writes the merged embeddings into its buffer.
        """
        del req_states
        if self._inputs is None:
            return
        self._inputs.images = None
        if self.supports_mm_inputs:
            self.execute_mm_encoder(scheduled_encoder_inputs)
            embeddings, is_image = self.gather_mm_embeddings(input_batch)
            if embeddings:
                self._inputs.images = embeddings, is_image

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, Tensor]:
        """Embeddings of all rows, with self-conditioning applied to canvas rows.

        A model that is not conditioned on itself runs on the ids as they are.
        """
        nowhere = self.pool.causal
        if self._fusion.why_not is None:
            nowhere = place_rows(input_batch, self.pool, req_states, foreseen=self._fusion.foreseen)
        self.model.sampler_takes_hidden = True
        if self._inputs is None:
            return {}
        self._inputs.write(input_batch.input_ids[: input_batch.num_tokens], input_batch, nowhere)
        return {"inputs_embeds": self._inputs.buffer[: input_batch.num_tokens_after_padding]}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Tensor]:
        """Inputs for graph capture: the buffer that ``prepare_inputs`` writes."""
        del num_reqs
        if self._inputs is None:
            return {}
        return {"inputs_embeds": self._inputs.buffer[:num_tokens]}
