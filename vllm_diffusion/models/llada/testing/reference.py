"""LLaDA as its definition says it: prompt and whole answer in every step, every row sees every row.

Takes a decoder of Transformers. Gives the greedy answer, for the engine to be held to. Each way to
get it wrong is an argument, so that a test can show that it would notice.
"""

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import SimpleNamespace
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
    block: int = 32,
    max_steps: int = 32,
    threshold: float = 0.0,
    surer: Callable[[int, int, float], float] = by_score,
    ends: Collection[int] = (),
    early: bool = False,
    kept_prefix: bool = False,
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
        kept_prefix: an approximation, see ``KeptPrefix``.
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
        asked = replace(rule, model=KeptPrefix(model, first)) if kept_prefix else rule
        steps.append(asked.canvas(shown, first, behind, seen.tril() if causal else seen, log_prob))
        tokens[:behind] = shown[:behind]
        if set(ends) & set(tokens[given:behind]):
            break
    said = tokens[given:]
    return cut(Answer(said, [log_prob.get(given + n, 0.0) for n in range(len(said))], steps), ends)


class KeptPrefix:
    """A decoder for one block: keys before the block stay those of its first step.

    What Fast-dLLM (arXiv 2505.22618) calls a prefix cache; approximate, since these keys depend on
    the masks that the block still had.

    Args:
        model: the decoder.
        first: the block's first position.
    """

    def __init__(self, model: Any, first: int) -> None:
        self._model, self._first = model, first
        self._kept: Any = None

    def __call__(
        self, *, input_ids: "Tensor", attention_mask: "Tensor", position_ids: "Tensor", **_: bool
    ) -> SimpleNamespace:
        """Logits [1, T, V] of all positions, those before the block only in the first step."""
        from torch.nn.functional import pad

        first = self._first if self._kept is not None else 0
        out = self._model(
            input_ids=input_ids[:, first:],
            attention_mask=attention_mask[:, :, first:],
            position_ids=position_ids[:, first:],
            past_key_values=copy.deepcopy(self._kept),
            use_cache=True,
        )
        if self._kept is None:
            self._kept = out.past_key_values
            self._kept.crop(self._first)
        return SimpleNamespace(logits=pad(out.logits, (0, 0, first, 0)))
