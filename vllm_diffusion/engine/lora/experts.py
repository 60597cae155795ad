"""Experts that adapters can change, on a CPU host.

vLLM's own grouped kernel for CPUs takes the weights in a layout of its own and does both products
at once, with no place for an adapter between them. Here experts run one after the other, as plain
products; only engines that serve adapters for experts use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

if TYPE_CHECKING:
    from torch import Tensor, nn


class AdaptedExperts(LoRAExpertsMixin, CPUUnquantizedExperts):
    """A gated expert is down(gelu(gate) * up), every product with the factors of a row's slot."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weights as they are in the file."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        *others: Any,
        **more: Any,
    ) -> None:
        """Sum every row's chosen experts, weighted, into ``output``.

        Args:
            output: [R, H], overwritten.
            hidden_states: [R, H].
            w1: [E, 2I, H], gate above up.
            w2: [E, H, I].
            topk_weights: [R, k].
            topk_ids: [R, k] experts of a row.
            activation: of the gate; gelu by tanh is the only one that is built.
            others: quantisation scales and workspaces, of no use here.
            more: the same.
        """
        del others, more
        assert activation is MoEActivation.GELU_TANH, activation
        output.zero_()
        for expert in sorted(set(topk_ids.flatten().tolist())):
            rows, choice = (topk_ids == expert).nonzero(as_tuple=True)
            given = hidden_states[rows]
            both = F.linear(given, w1[expert])
            self._change(both, given, rows, expert, matrix="w13")
            gate, up = both.chunk(2, dim=-1)
            hidden = F.gelu(gate, approximate="tanh") * up
            result = F.linear(hidden, w2[expert])
            self._change(result, hidden, rows, expert, matrix="w2")
            share = topk_weights[rows, choice, None].to(result.dtype)
            output.index_add_(0, rows, (result * share).to(output.dtype))

    def _change(self, y: Tensor, x: Tensor, rows: Tensor, expert: int, *, matrix: str) -> None:
        """Add to y [r, O] what the adapters of these rows make of x [r, I]."""
        context = self._lora_context
        if context is None:
            return
        first = matrix == "w13"
        a = (context.w13_lora_a_stacked if first else context.w2_lora_a_stacked)[0]
        b = (context.w13_lora_b_stacked if first else context.w2_lora_b_stacked)[0]
        for slot, members in context.punica_wrapper.groups:
            chosen = torch.isin(rows, members)
            if chosen.any():
                change = x[chosen].to(a.dtype) @ a[slot, expert].T @ b[slot, expert].T
                y[chosen] += change.to(y.dtype)
