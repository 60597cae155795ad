"""SDAR as its definition says it: one dense mask, no cache, the whole sequence in every step.

Takes a decoder of Transformers. Gives the greedy answer, for the engine to be held to. Each way to
get it wrong is an argument, so that a test can show that it would notice.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Answer:
    """What a prompt is answered with."""

    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    """Of every token, in the step that revealed it; the mask excluded, nothing else cut."""
    steps: list[int] = field(default_factory=list)
    """Forwards of every block."""


def answer(
    model: Any,
    prompt: Sequence[int],
    length: int,
    *,
    mask_id: int,
    block: int,
    max_steps: int | None = None,
    threshold: float = 0.85,
    leftmost: bool = False,
    ends: Collection[int] = (),
    causal_prompt: bool = False,
    grid_at_prompt_end: bool = False,
) -> Answer:
    """Reveal block after block of the grid; the last block is whole, the answer is cut.

    Args:
        model: gives logits; eager attention, fp32.
        prompt: its ids.
        length: most tokens of the answer.
        mask_id: what an open position holds.
        block: B.
        max_steps: T, forwards a block may take; B by default.
        threshold: every open position surer than this is revealed; 0: the schedule alone.
        leftmost: reveal from left to right instead of the surest.
        ends: ids that end the answer.
        causal_prompt: wrong on purpose: the prompt's rows do not see those behind them.
        grid_at_prompt_end: wrong on purpose: blocks begin where the prompt ends.
    """
    import torch

    tokens, given, result = list(prompt), len(prompt), Answer()
    anchor = given % block if grid_at_prompt_end else 0
    log_prob: dict[int, float] = {}
    while len(tokens) < given + length and not set(ends) & set(tokens[given:]):
        behind = ((len(tokens) - anchor) // block + 1) * block + anchor
        tokens += [mask_id] * (behind - len(tokens))
        first = max(behind - block, given)
        seen = visible(behind, block, anchor=anchor, causal=given if causal_prompt else 0)
        step, last = 0, max_steps or block
        while mask_id in tokens[first:]:
            logits = dense_logits(model, tokens, seen)
            logits[:, mask_id] = -torch.inf
            scores, best = logits.log_softmax(dim=-1).max(dim=-1)
            still = [place for place in range(first, behind) if tokens[place] == mask_id]
            order = still if leftmost else sorted(still, key=lambda at: (-float(scores[at]), at))
            floor = len(still) if step == last - 1 else block // last + (step < block % last)
            sure = [at for at in still if threshold and float(scores[at].exp()) > threshold]
            for place in sure if len(sure) >= floor else order[:floor]:
                tokens[place] = int(best[place])
                log_prob[place] = float(scores[place])
            step += 1
        result.steps.append(step)
    count = next((n for n, token in enumerate(tokens[given:], 1) if token in ends), length)
    result.tokens.extend(tokens[given : given + min(count, length)])
    result.log_probs.extend(log_prob[given + n] for n in range(len(result.tokens)))
    return result


def visible(total: int, block: int, *, anchor: int = 0, causal: int = 0) -> "Tensor":
    """[T, T] bool, which columns a row sees: its own block and those before it.

    Args:
        total: T.
        block: B.
        anchor: where a block begins; 0 by definition.
        causal: of the first so many positions, rows see only up to themselves; 0 by definition.
    """
    import torch

    place = torch.arange(total)
    number = (place - anchor).div(block, rounding_mode="floor")
    seen = number[:, None] >= number[None]
    seen[:causal] &= place[None] <= place[:causal, None]
    return seen


def dense_logits(model: Any, tokens: Sequence[int], seen: "Tensor") -> "Tensor":
    """[T, V] fp32 logits of every position under a mask of one's own."""
    import torch

    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([tokens]),
            attention_mask=bias[None, None],
            position_ids=torch.arange(len(tokens))[None],
            use_cache=False,
        )
    return out.logits[0].float()
