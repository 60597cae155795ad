"""One differentiable pass of Transformers' DiffusionGemma over packed rows.

Generation runs encoder and decoder one after the other over a cache. They share their weights, so
training runs the layers once over clean and noised tokens together, with a mask that gives every
token what it would see. Built from Transformers' own modules; only the experts are computed
densely, every expert on every token, which is faster than gathering at this size.
"""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from packing import Rows
from torch import nn
from transformers import DiffusionGemmaForBlockDiffusion


class PackedPass(nn.Module):
    """Logits of the views of `Rows`."""

    def __init__(self, model: DiffusionGemmaForBlockDiffusion) -> None:
        super().__init__()
        self.model = model
        text = model.config.text_config
        self.kinds: list[str] = text.layer_types
        self.softcap: float = text.final_logit_softcapping
        self.root = text.hidden_size**0.5
        for layer in self.encoder.layers:
            layer.experts.forward = MethodType(_dense_experts, layer.experts)

    @property
    def encoder(self) -> Any:
        """Text layers whose weights the decoder shares."""
        return self.model.model.encoder.language_model

    @property
    def decoder(self) -> Any:
        """Embedding and self-conditioning."""
        return self.model.model.decoder

    def forward(
        self,
        rows: Rows,
        soft: torch.Tensor,
        full: torch.Tensor,
        sliding: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [rows, ROW, vocab] fp32 given the soft embedding [rows, ROW, hidden] of views.

        `full` and `sliding` are the rows' visibility with and without the layers' window.
        """
        clean = self.decoder.embed_tokens(rows.tokens)
        noised = self.decoder.self_conditioning(clean, soft)
        hidden = torch.where((rows.view > 0)[..., None], noised, clean)
        masks = {"full_attention": full, "sliding_attention": sliding}
        angles = {
            kind: self.encoder.rotary_emb(hidden, rows.position, kind) for kind in set(self.kinds)
        }
        for layer, kind in zip(self.encoder.layers, self.kinds, strict=True):
            hidden = layer(
                hidden,
                position_embeddings=angles[kind],
                attention_mask=masks[kind],
                position_ids=rows.position,
            )
        logits = self.model.lm_head(self.encoder.norm(hidden)).float()
        return torch.tanh(logits / self.softcap) * self.softcap

    def soften(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Soft embedding that the next step is conditioned on."""
        weight = self.decoder.embed_tokens.weight
        return (logits / temperature).softmax(-1).to(weight.dtype) @ weight * self.root


def _dense_experts(
    self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    share = torch.zeros(
        hidden.shape[0], self.num_experts, dtype=weights.dtype, device=hidden.device
    ).scatter(1, chosen, weights)
    experts = [
        F.linear(_gated(F.linear(hidden, up)), down) * share[:, n, None].to(hidden.dtype)
        for n, (up, down) in enumerate(zip(self.gate_up_proj, self.down_proj, strict=True))
    ]
    return torch.stack(experts).sum(0)


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
