"""The two places where DiffusionGemma differs from Gemma 4 inside a forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import GeluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models.gemma4 import Gemma4DecoderLayer

if TYPE_CHECKING:
    from vllm.model_executor.layers.quantization import QuantizationConfig


class SelfConditioning(nn.Module):
    """post_norm(embedding + MLP(pre_norm(soft embedding))): what a canvas row is fed.

    Only canvas rows pass through it. Prompt and commit rows must not, not even with a zero soft
    embedding: post_norm alone changes the embedding.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        eps: float,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(hidden_size, eps=eps)
        self.post_norm = RMSNorm(hidden_size, eps=eps, has_weight=False)
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size,
            [intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
            return_bias=False,
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
            return_bias=False,
        )
        self.activation = GeluAndMul(approximate="tanh")

    def forward(self, embedding: Tensor, soft_embedding: Tensor) -> Tensor:
        """Both arguments and the result: [R, H] model dtype."""
        return self.post_norm(embedding + self.inner(self.pre_norm(soft_embedding)))

    def inner(self, normed: Tensor) -> Tensor:
        """The MLP between the norms: [R, H] model dtype, as its result."""
        return self.down_proj(self.activation(self.gate_up_proj(normed)))


class CanvasDecoderLayer(Gemma4DecoderLayer):
    """A Gemma 4 layer whose output scalar depends on what a row is.

    Encoder rows (prompt, commit) and decoder rows (canvas) share the weights but may hold apart
    ``layer_scalar``. Gemma4Model builds its layers itself, so a layer is turned into this class
    after it was built (``adopt``): names, quantisation prefixes and module order stay vLLM's.
    """

    encoder_layer_scalar: Tensor
    decoder_layer_scalar: Tensor
    canvas_rows: Tensor

    @classmethod
    def adopt(cls, layer: Gemma4DecoderLayer, canvas_rows: Tensor) -> None:
        """Turn a built layer into this class.

        Args:
            layer: a layer of Gemma4Model; changed in place.
            canvas_rows: [max tokens, 1] bool, shared by all layers, True where a row of the
                current forward is a canvas row. At a fixed address, so that captured graphs see
                every step's values.
        """
        # The base class multiplies by layer_scalar: it stays 1 and is not in any file any more.
        layer.register_buffer("layer_scalar", torch.ones(1), persistent=False)
        layer.register_buffer("encoder_layer_scalar", torch.ones(1))
        layer.register_buffer("decoder_layer_scalar", torch.ones(1))
        layer.register_buffer("canvas_rows", canvas_rows, persistent=False)
        layer.__class__ = cls

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        per_layer_input: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Gemma 4's layer, then the scalar of each row's kind."""
        hidden_states, residual = super().forward(
            positions, hidden_states, residual, per_layer_input=per_layer_input, **kwargs
        )
        scalar = torch.where(
            self.canvas_rows[: hidden_states.shape[0]],
            self.decoder_layer_scalar,
            self.encoder_layer_scalar,
        )
        return hidden_states * scalar, residual
