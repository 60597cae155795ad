"""Begin LLaDA with the weights of a trained SDAR, most of which mean the same in both.

SDAR norms queries and keys, which LLaDA does not: the norm is replaced by its mean over a batch.
Keys and values that several heads share are given to each.
"""
# ruff: noqa: ANN401 - Transformers' classes are not followed by a type checker

from functools import partial
from typing import Any

import torch
from noising import Rows


@torch.no_grad()
def inherit(llada: Any, sdar: Any, rows: Rows) -> None:
    """Overwrite the weights of `llada`, whose sizes are those of `sdar`.

    Args:
        llada: Llama with a head.
        sdar: Qwen3 with a head.
        rows: a batch of SDAR's, to measure queries and keys on.
    """
    means = mean_norms(sdar, rows)
    weights = dict(sdar.named_parameters())
    for name, own in llada.named_parameters():
        weight = weights[name]
        layer, _, part = name.rpartition(".self_attn.")
        part = part.removesuffix("_proj.weight")
        if part in {"q", "k", "v"}:
            heads = weight.unflatten(0, (-1, sdar.config.head_dim))
            if part != "v":
                norm = weights[f"{layer}.self_attn.{part}_norm.weight"]
                heads = heads * (norm / means[f"{layer}.self_attn.{part}_norm"])[..., None]
            weight = heads.repeat_interleave(own.numel() // weight.numel(), 0).flatten(0, 1)
        own.copy_(weight)


def mean_norms(sdar: Any, rows: Rows) -> dict[str, torch.Tensor]:
    """By name of a norm of queries or keys, the mean root mean square of every head, [heads, 1]."""
    found: dict[str, torch.Tensor] = {}
    seen = rows.item >= 0

    def measure(name: str, _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        squares = inputs[0].square().mean(-1, keepdim=True)  # [rows, ROW, heads, 1]
        found[name] = squares[seen].sqrt().mean(0)

    hooks = [
        module.register_forward_pre_hook(partial(measure, name))
        for name, module in sdar.named_modules()
        if name.endswith(("q_norm", "k_norm"))
    ]
    sdar(input_ids=rows.tokens, attention_mask=rows.visibility(), position_ids=rows.position)
    for hook in hooks:
        hook.remove()
    return found
