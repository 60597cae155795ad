"""Repetition, frequency and presence penalties over the text before a canvas.

Only text counts: the prompt (for repetition) and the committed canvases. The canvas that is being
denoised counts once it is committed: until then its tokens change from step to step, and each would
be penalised for guesses about its neighbours. Inside a canvas the model itself sees repetition.
Where noise is masks, what is revealed stays: such tokens count from the next step on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_diffusion.constrain.rewrite import Penalties


def text_penalties(
    text: Tensor,
    length: Tensor,
    prompt_length: Tensor,
    *,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
    revealed: Tensor | None = None,
) -> Penalties:
    """Penalties of the ids in a text, without a table over the vocabulary.

    Args:
        text: [B, N] int64, prompt and committed tokens; anything from ``length`` on.
        length: [B] int64, tokens of text, at least 1.
        prompt_length: [B] int64, how many of them are the prompt.
        repetition: [B] fp32, 1 for none; frequency, presence: [B] fp32, 0 for none.

        revealed: [B, L] int64, tokens of the canvas that count as written, -1 where there is none;
            None for no token.

    Returns:
        Penalties with N (+ L) ids a canvas, repeated where the text repeats them.
    """
    index = torch.arange(text.shape[1], device=text.device)
    # Padding repeats the first token without counting, so it gets the numbers of that token.
    ids = torch.where(index < length[:, None], text, text[:, :1])
    written = (index >= prompt_length[:, None]) & (index < length[:, None])
    if revealed is not None:
        said = revealed >= 0
        ids = torch.cat([ids, torch.where(said, revealed, text[:, :1])], dim=1)
        written = torch.cat([written, said], dim=1)
    ids, order = ids.sort(dim=1)
    total = written.gather(1, order).cumsum(dim=1)
    total = torch.nn.functional.pad(total, (1, 0))
    first = torch.searchsorted(ids, ids, right=False)
    behind = torch.searchsorted(ids, ids, right=True)
    count = (total.gather(1, behind) - total.gather(1, first)).to(torch.float32)
    return Penalties(
        ids=ids,
        scale=repetition[:, None].expand(ids.shape),
        offset=frequency[:, None] * count + presence[:, None] * (count > 0),
    )


def penalise(logits: Tensor, ids: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Apply penalties: logit / scale or * scale by its sign, then minus offset, as vLLM does.

    Args:
        logits: [R, V] fp32.
        ids: [R, N] int64, in the vocabulary; an id listed twice has the same numbers twice.
        scale: [R, N] fp32, positive.
        offset: [R, N] fp32.

    Returns:
        [R, V] fp32, a new tensor.
    """
    chosen = logits.gather(1, ids)
    chosen = torch.where(chosen > 0, chosen / scale, chosen * scale) - offset
    return logits.scatter(1, ids, chosen)
