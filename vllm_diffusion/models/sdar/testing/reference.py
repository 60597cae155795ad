"""SDAR as its definition says it: blocks of a grid, each seeing itself and those before it.

Takes a decoder of Transformers. Gives the greedy answer, for the engine to be held to. Each way to
get it wrong is an argument, so that a test can show that it would notice.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from vllm_diffusion.testing.dense_reveal import Answer, DenseReveal, by_score, cut

if TYPE_CHECKING:
    from torch import Tensor


def answer(
    model: Any,
    prompt: Sequence[int],
    length: int,
    *,
    mask_id: int,
    block: int,
    max_steps: int | None = None,
    threshold: float = 0.85,
    surer: Callable[[int, int, float], float] = by_score,
    ends: Collection[int] = (),
    early: bool = False,
    causal_prompt: bool = False,
    grid_at_prompt_end: bool = False,
) -> Answer:
    """Reveal block after block of the grid; the last block is whole, the answer is cut.

    Args:
        model: gives logits; eager attention.
        prompt: its ids.
        length: most tokens of the answer.
        mask_id: what an open position holds.
        block: B.
        max_steps: T, forwards a block may take; B by default.
        threshold: every open position surer than this is revealed; 0: the schedule alone.
        surer: which position is revealed first, see ``DenseReveal``.
        ends: ids that end the answer.
        early: whether a block is finished once an end has no open position before it.
        causal_prompt: wrong on purpose: the prompt's rows do not see those behind them.
        grid_at_prompt_end: wrong on purpose: blocks begin where the prompt ends.
    """
    rule = DenseReveal(
        model=model,
        mask_id=mask_id,
        max_steps=max_steps or block,
        threshold=threshold,
        split=block,
        surer=surer,
        early_ends=ends if early else (),
    )
    tokens, given, steps = list(prompt), len(prompt), []
    anchor = given % block if grid_at_prompt_end else 0
    log_prob: dict[int, float] = {}
    while len(tokens) < given + length and not set(ends) & set(tokens[given:]):
        behind = ((len(tokens) - anchor) // block + 1) * block + anchor
        tokens += [mask_id] * (behind - len(tokens))
        seen = visible(behind, block, anchor=anchor, causal=given if causal_prompt else 0)
        steps.append(rule.canvas(tokens, max(behind - block, given), behind, seen, log_prob))
    said = tokens[given : given + length]
    return cut(Answer(said, [log_prob.get(given + n, 0.0) for n in range(len(said))], steps), ends)


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
