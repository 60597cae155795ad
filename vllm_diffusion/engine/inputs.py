"""What a forward reads of its rows: their embeddings, and which of them are canvas rows.

Both stand in buffers that stay where they are, since captured graphs read them. The rows behind
logits are the canvases' and those of finished ones being committed. Which is which only the device
knows, so self-conditioning is computed for both, and kept where a row is a canvas's.
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
        max_tokens: most rows of a step, those of padding among them.
    """

    def __init__(self, model: SelfConditionedModel, pool: CanvasPool, *, max_tokens: int) -> None:
        self._model = model
        soft = pool.soft_embedding
        assert soft is not None
        self._soft = soft
        self.buffer = torch.zeros(max_tokens, soft.shape[-1], dtype=soft.dtype, device=soft.device)
        self.images: tuple[list[Tensor], Tensor] | None = None
        """Of the next step alone: embeddings, and which rows they belong to."""
        on_gpu = soft.device.type == "cuda"
        kernels = "vllm_diffusion.engine.input_kernels"
        self._condition = import_module(kernels).condition if on_gpu else condition

    def write(self, input_ids: Tensor, batch: Any, nowhere: Tensor) -> None:
        """Embed the tokens of a step, and mix into canvas rows what their canvas believes.

        Args:
            input_ids: [N] int32.
            batch: the runner's ``InputBatch``.
            nowhere: [slots] bool, whose rows behind logits belong to no canvas.
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
    """Mark canvas rows and put them through self-conditioning: the definition.

    Args:
        embeds: [N, H], changed where a row is a canvas's.
        canvas_rows: [max tokens, 1] bool, False everywhere; written at ``rows``.
        rows: [R] int64, the rows behind logits, each once.
        slots: [R], whose canvas each belongs to.
        place: [R], where on it.
        phase: [slots] bool, True where a slot's rows are being committed.
        soft: [slots, L, H] soft embeddings.
        layer: self-conditioning.
        adapters: told which rows are canvas rows before the layer runs, or None.
    """
    is_canvas = ~phase[slots][:, None]
    believed = soft[slots, place]
    canvas_rows[rows] = is_canvas
    if adapters is not None:
        adapters.place(canvas_rows, rows)
    plain = embeds[rows]
    embeds[rows] = torch.where(is_canvas, layer(plain, believed), plain)
