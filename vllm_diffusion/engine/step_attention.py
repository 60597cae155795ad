"""Attention metadata of a step: which rows see which.

vLLM asks the model state for it before every forward. GPU backends take sequences and, where text
is causal, ranges (``attention.sequences``, ``attention.gpu``), the CPU backend takes segments
(``attention.segments``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

from vllm_diffusion.engine.attention.gpu import BlockLocalMask
from vllm_diffusion.engine.attention.segments import plan_blocks, plan_segments
from vllm_diffusion.engine.attention.sequences import (
    Parts,
    blocks_of,
    parts_of,
    require_many_sequences,
    sequences_of,
    sequences_without_causality,
)
from vllm_diffusion.engine.granted import canvas_and_padding, text_rows
from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.utils import AttentionGroup

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.engine.attention.segments import Segment
    from vllm_diffusion.engine.attention.sequences import Sequences
    from vllm_diffusion.engine.fusion import Fusion
    from vllm_diffusion.family import Family


class StepAttention:
    """Builds the metadata of every step; tensors that captured graphs read keep their address.

    Args:
        vllm_config: the engine's config.
        family: of the model, which says what text sees.
        pool: the canvases, whose phase determines which rows are causal.
        fusion: whether text may run beside a canvas.
        slots: most concurrent requests.
        max_tokens: most rows of a step.
        max_span: most positions of an image that attends to itself bidirectionally, 0 for none.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        family: Family,
        pool: CanvasPool,
        fusion: Fusion,
        *,
        slots: int,
        max_tokens: int,
        max_span: int,
    ) -> None:
        self._family, self._pool, self._fusion = family, pool, fusion
        self._max_model_len = vllm_config.model_config.max_model_len
        # A request may be two attention sequences.
        max_sequences = 2 * slots
        self._causal = torch.zeros(max_sequences, dtype=torch.int32, device=pool.device)
        if pool.device.type == "cpu":
            return
        layers = get_layers_from_vllm_config(vllm_config, Attention)
        if family.text is not Text.CAUSAL:
            require_many_sequences(layers, family.text)
        else:
            self._block_local_mask = BlockLocalMask(
                layers,
                canvas_length=pool.canvas_length,
                max_model_len=self._max_model_len,
                max_rows=max_sequences,
                max_tokens=max_tokens,
                device=pool.device,
                max_span=max_span,
            )

    def cudagraph_support(self) -> tuple[AttentionCGSupport, str]:
        """Which batches may run as one captured graph, for ``get_additional_cg_support``.

        Those of running requests alone, with as many rows each as a canvas: each is one sequence,
        and a canvas has one range, all in buffers at fixed addresses. A batch with prompt rows may
        have any number of sequences, or of images, whose number is compiled into a kernel. Where
        all text runs in every step, every batch is one of prompts.
        """
        whole = self._family.text is Text.WHOLE
        support = AttentionCGSupport.NEVER if whole else AttentionCGSupport.UNIFORM_BATCH
        return support, StepAttention.__name__

    def metadata(
        self,
        input_batch: InputBatch,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        *,
        spans: list[list[tuple[int, int]]],
        padded: bool,
        for_capture: bool,
    ) -> dict[str, Any]:
        """Attention metadata by layer name, see ``ModelState.prepare_attn`` of vLLM.

        Args:
            input_batch: the step's batch.
            block_tables, slot_mappings, attn_groups, kv_cache_config: as vLLM gives them.
            spans: half-open absolute ranges that attend bidirectionally, by request.
            padded: the forward is one captured graph on a padded batch.
            for_capture: the graph is being captured.
        """
        num_reqs = input_batch.num_reqs_after_padding if padded else input_batch.num_reqs
        num_tokens = input_batch.num_tokens_after_padding if padded else input_batch.num_tokens
        if self._pool.device.type == "cpu":
            segments = self._segments(input_batch, num_reqs, spans)
            return _by_segments(segments, input_batch, block_tables, slot_mappings, attn_groups)
        sequences = self._sequences(
            input_batch, num_reqs, block_tables, spans, graph=padded or for_capture
        )
        metadata = build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=sequences.lens.shape[0],
            num_tokens=num_tokens,
            query_start_loc_gpu=sequences.starts,
            query_start_loc_cpu=sequences.starts_on_host,
            max_query_len=sequences.longest,
            seq_lens=sequences.lens,
            max_seq_len=self._max_model_len,
            block_tables=sequences.block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            seq_lens_cpu_upper_bound=sequences.lens_at_most,
            mm_req_doc_ranges={
                index: [(first, behind - 1) for first, behind in spans]
                for index, spans in enumerate(sequences.spans)
            },
            for_cudagraph_capture=for_capture,
            causal=sequences.causal,
        )
        if self._family.text is Text.CAUSAL:
            self._block_local_mask.set_canvas_ranges(metadata)
        return metadata

    def _sequences(
        self,
        input_batch: InputBatch,
        count: int,
        block_tables: tuple[Tensor, ...],
        spans: list[list[tuple[int, int]]],
        *,
        graph: bool,
    ) -> Sequences:
        """The rows of a step for GPUs; the requests of a graph are one sequence each."""
        if self._family.text is not Text.CAUSAL:
            parts, block = None, self._family.block
            if self._family.text is Text.BLOCK and not graph:
                assert block is not None
                rows = input_batch.num_scheduled_tokens
                parts = blocks_of(input_batch.num_computed_tokens_np, rows, block)
            return sequences_without_causality(
                input_batch, parts, count=count, block_tables=block_tables
            )
        sequences = sequences_of(
            input_batch,
            self._parts(input_batch),
            count=count,
            phase=self._pool.causal,
            causal=self._causal,
            block_tables=block_tables,
            spans=spans,
        )
        # A batch of only prompts takes the backends' cheaper causal path; a graph needs flags.
        return (
            sequences if graph or input_batch.num_draft_tokens else replace(sequences, causal=True)
        )

    def _parts(self, input_batch: InputBatch) -> Parts | None:
        """Text and canvas rows, if a slot's phase does not determine what a request's rows are.

        Only fused commits run text in a slot whose canvas has begun, either before it or alone.
        """
        drafts = input_batch.num_draft_tokens_per_req
        if self._fusion.why_not is not None or drafts is None:
            return None
        rows, foreseen = input_batch.num_scheduled_tokens, self._fusion.foreseen
        return parts_of(rows, drafts, foreseen=foreseen) if text_rows(input_batch).any() else None

    def _segments(
        self, input_batch: InputBatch, num_reqs: int, spans: list[list[tuple[int, int]]]
    ) -> list[Segment]:
        """The rows of a step by visibility, for CPU hosts."""
        starts = input_batch.query_start_loc_np.tolist()
        lens = input_batch.seq_lens[:num_reqs].tolist()
        if self._family.text is not Text.CAUSAL:
            block = self._family.block if self._family.text is Text.BLOCK else None
            return plan_blocks(starts, lens, block)
        causal = self._causal[:num_reqs]
        causal.zero_()
        causal[: input_batch.num_reqs] = self._pool.causal[input_batch.idx_mapping].int()
        # A slot that is not causal may still run text, alone or before its canvas.
        drafts = input_batch.num_draft_tokens_per_req
        canvas = np.zeros(causal.shape[0], np.int64) if drafts is None else drafts
        canvas, padding = np.where(causal.numpy() == 0, canvas, 0), None
        if self._fusion.foreseen and drafts is not None:
            canvas, padding = canvas_and_padding(input_batch, self._pool)
        return plan_segments(
            starts, lens, canvas.tolist(), spans, None if padding is None else padding.tolist()
        )


def _by_segments(
    segments: list[Segment],
    input_batch: InputBatch,
    block_tables: tuple[Tensor, ...],
    slot_mappings: Tensor,
    attn_groups: list[list[AttentionGroup]],
) -> dict[str, Any]:
    """Metadata for CPU hosts: every segment is a sequence of its own."""
    # Imported here because the CPU backend looks for its kernels, which only CPU hosts have.
    from vllm_diffusion.engine.attention.cpu import segmented_metadata

    return {
        name: metadata
        for groups, table, slots in zip(attn_groups, block_tables, slot_mappings, strict=True)
        for group in groups
        for metadata in (
            segmented_metadata(
                segments,
                builder=group.get_metadata_builder(),
                block_table=group.map_to_kernel_block_table(table),
                slot_mapping=slots,
                num_tokens=input_batch.num_tokens,
            ),
        )
        for name in group.layer_names
    }
