"""LLaDA as its definition says it: prompt and whole answer in every step, every row sees every row.

Takes a decoder of Transformers. Gives the greedy answer, for the engine to be held to. Each way to
get it wrong is an argument, so that a test can show that it would notice.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from vllm_diffusion.testing.dense_reveal import Answer, DenseReveal, by_score, cut


def answer(
    model: Any,
    prompt: Sequence[int],
    length: int,
    *,
    mask_id: int,
    block: int = 32,
    max_steps: int = 32,
    threshold: float = 0.0,
    surer: Callable[[int, int, float], float] = by_score,
    ends: Collection[int] = (),
    early: bool = False,
    causal: bool = False,
    horizon: bool = True,
) -> Answer:
    """Reveal the blocks of an answer from left to right, with the masks behind them in sight.

    Args:
        model: gives logits; eager attention.
        prompt: its ids.
        length: tokens of the answer; the last block may be shorter.
        mask_id: what an open position holds.
        block: positions that are revealed before those behind them.
        max_steps: T, forwards a block may take.
        threshold: every open position surer than this is revealed; 0: the schedule alone.
        surer: which position is revealed first, see ``DenseReveal``.
        ends: ids that end the answer, asked after every block.
        early: whether a block is finished once an end has no open position before it.
        causal: wrong on purpose: rows see only up to themselves.
        horizon: wrong on purpose where it is False: the masks behind a block are not there.
    """
    import torch

    rule = DenseReveal(
        model=model,
        mask_id=mask_id,
        max_steps=max_steps,
        threshold=threshold,
        surer=surer,
        early_ends=ends if early else (),
    )
    given, steps = len(prompt), []
    tokens = [*prompt, *[mask_id] * length]
    log_prob: dict[int, float] = {}
    for first in range(given, len(tokens), block):
        behind = min(first + block, len(tokens))
        shown = tokens if horizon else tokens[:behind]
        seen = torch.ones(len(shown), len(shown), dtype=torch.bool)
        steps.append(rule.canvas(shown, first, behind, seen.tril() if causal else seen, log_prob))
        tokens[:behind] = shown[:behind]
        if set(ends) & set(tokens[given:behind]):
            break
    said = tokens[given:]
    return cut(Answer(said, [log_prob.get(given + n, 0.0) for n in range(len(said))], steps), ends)
