"""Inputs of a forward: the embeddings of its rows, and the mask of canvas rows.

Both are in buffers at fixed addresses, since captured graphs read them. Rows with logits belong to
canvases or to finished canvases being committed. Only the device knows which, so self-conditioning
is computed for both and kept only for canvas rows.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.family import SelfConditionedModel, SelfConditioning


class CanvasInputs:
    """The embeddings of a step's rows.

    Args:
        model: embeds tokens, conditions canvas rows and holds ``canvas_rows``.
        pool: the canvases' state.
        max_tokens: most rows of a step, including padding.
    """

    def __init__(self, model: SelfConditionedModel, pool: CanvasPool, *, max_tokens: int) -> None:
        self._model = model
        soft = pool.soft_embedding
        assert soft is not None
        self._soft = soft
        self.buffer = torch.zeros(max_tokens, soft.shape[-1], dtype=soft.dtype, device=soft.device)
        self.images: tuple[list[Tensor], Tensor] | None = None
        """Multimodal embeddings of the next step, and the mask of their rows."""
        on_gpu = soft.device.type == "cuda"
        kernels = "vllm_diffusion.engine.input_kernels"
        self._condition = import_module(kernels).condition if on_gpu else condition

    def write(self, input_ids: Tensor, batch: Any, nowhere: Tensor) -> None:
        """Embed the tokens of a step and apply self-conditioning to the canvas rows.

        Args:
            input_ids: [N] int32.
            batch: the runner's ``InputBatch``.
            nowhere: [slots] bool, slots whose rows with logits belong to no canvas.
        """
        embeds = self.buffer[: input_ids.shape[0]]
        self._embed(input_ids, embeds)
        canvas_rows = self._model.canvas_rows
        rows = batch.logits_indices
        if not batch.num_draft_tokens or rows.shape[0] < input_ids.shape[0]:
            canvas_rows.zero_()  # not all of them are written below
        if not batch.num_draft_tokens:
            return
        self._condition(
            embeds,
            canvas_rows,
            rows=rows,
            slots=batch.expanded_idx_mapping,
            place=batch.expanded_local_pos,
            phase=nowhere,
            soft=self._soft,
            layer=self._model.self_conditioning,
            adapters=self._model.adapters,
        )

    def _embed(self, input_ids: Tensor, out: Tensor) -> None:
        if self.images is None:
            self._model.embed_text(input_ids, out)
            return
        (embeddings, is_image), self.images = self.images, None
        out.copy_(
            self._model.embed_input_ids(
                input_ids, multimodal_embeddings=embeddings, is_multimodal=is_image
            )
        )


def condition(
    embeds: Tensor,
    canvas_rows: Tensor,
    *,
    rows: Tensor,
    slots: Tensor,
    place: Tensor,
    phase: Tensor,
    soft: Tensor,
    layer: SelfConditioning,
    adapters: Any,
) -> None:
    """Mark canvas rows and apply self-conditioning to them (the definition).

    Args:
        embeds: [N, H], changed in place at canvas rows.
        canvas_rows: [max tokens, 1] bool, False everywhere; written at ``rows``.
        rows: [R] int64, the rows with logits, each once.
        slots: [R], slot of each row.
        place: [R], index of each row in its canvas.
        phase: [slots] bool, True for slots whose rows are being committed.
        soft: [slots, L, H] soft embeddings.
        layer: the self-conditioning layer.
        adapters: informed which rows are canvas rows before the layer runs; None without LoRA.
    """
    is_canvas = ~phase[slots][:, None]
    believed = soft[slots, place]
    canvas_rows[rows] = is_canvas
    if adapters is not None:
        adapters.place(canvas_rows, rows)
    plain = embeds[rows]
    embeds[rows] = torch.where(is_canvas, layer(plain, believed), plain)
