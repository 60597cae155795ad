"""A finished text with holes, without the unused places of its holes.

The budget of a hole is the most tokens it may take; unused places hold the tokenizer's pad token.
When the canvas finishes, such rows are dropped and the others move together before the commit, so
that no token, log-probability or KV of the answer contains them.

    rows      N a m e :   A n n _ _   C i t y : _ _ R o m e <eos> _ _ _      _ is pad
    tokens    N a m e :   A n n   C i t y : R o m e <eos>

What stands behind the shown rows (the suffix, pads) was context for the holes and is dropped too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_diffusion.records import Commit

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Slack


def without_slack(slack: Slack, argmax: Tensor, valid: Tensor) -> Commit:
    """What the canvases of a batch commit if they finish now.

    Args:
        slack: of B canvases; one whose rows are all shown and none a hole commits all of them.
        argmax: [B, L] int64.
        valid: [B, L] bool.
    """
    place = torch.arange(argmax.shape[1], device=argmax.device)
    shown = slack.shown & valid
    kept = shown & ~(slack.hole & (argmax == slack.pad[:, None]))
    # Kept rows first, both parts in their order.
    rows = torch.argsort(~kept, dim=1, stable=True)
    count, most = kept.sum(dim=1), shown.sum(dim=1)
    ends = (slack.end >= 0) & (count < most)
    here = ends[:, None] & (place == count[:, None])
    tokens = torch.where(here, slack.end[:, None], argmax.gather(1, rows))
    return Commit(tokens=tokens, rows=rows, count=count + ends)
