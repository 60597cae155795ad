"""The rule `reveal` as its definition says it: a dense mask, no cache, everything in every step.

Takes a decoder of Transformers, tokens with masks among them, and which row sees which. Reveals one
canvas greedily, for the engine to be held to. `models.<family>.testing.reference` says what a
canvas is and what it sees.
"""

from collections.abc import Callable, Collection
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
    """Forwards of every canvas."""


def by_score(_step: int, _place: int, score: float) -> float:
    """The surest first."""
    return score


def leftmost(_step: int, place: int, _score: float) -> float:
    """From left to right."""
    return -place


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseReveal:
    """The rule and the model that it asks."""

    model: Any
    """Gives logits; eager attention."""
    mask_id: int
    """What an open position holds."""
    max_steps: int
    """T, forwards that a canvas may take."""
    threshold: float
    """Every open position that is surer than this is revealed; 0: the schedule alone."""
    split: int | None = None
    """Positions whose even split over T is the floor, however many are open: the block of a grid.
    None for what is open, spread over the steps that are left."""
    surer: Callable[[int, int, float], float] = by_score
    """(step, position, log-probability) -> what decides who is revealed first."""
    early_ends: Collection[int] = ()
    """Ids that finish a canvas as soon as one has no open position before it."""

    def canvas(
        self, tokens: list[int], first: int, behind: int, seen: "Tensor", log_prob: dict[int, float]
    ) -> int:
        """Reveal the masks of `tokens[first:behind]`, in place.

        Args:
            tokens: ids of all positions that the model is shown.
            first: the canvas's first position.
            behind: the one behind its last.
            seen: [T, T] bool, which columns a row sees.
            log_prob: gets that of each token in the step that revealed it.

        Returns:
            The steps it took.
        """
        step = 0
        while still := self._open(tokens, first, behind):
            logits = dense_logits(self.model, tokens, seen)
            logits[:, self.mask_id] = -float("inf")
            scores, best = logits.log_softmax(dim=-1).max(dim=-1)
            rank = {place: self.surer(step, place, float(scores[place])) for place in still}
            order = sorted(still, key=lambda place: (-rank[place], place))
            sure = [
                at for at in still if self.threshold and float(scores[at].exp()) > self.threshold
            ]
            floor = self._floor(step, len(still))
            for place in sure if len(sure) >= floor else order[:floor]:
                tokens[place], log_prob[place] = int(best[place]), float(scores[place])
            step += 1
        return step

    def _open(self, tokens: list[int], first: int, behind: int) -> list[int]:
        """Positions that are still to be revealed; none where nobody will read them."""
        still = [place for place in range(first, behind) if tokens[place] == self.mask_id]
        before = tokens[first : still[0]] if still else []
        return [] if set(self.early_ends) & set(before) else still

    def _floor(self, step: int, still: int) -> int:
        left = self.max_steps - step
        if self.split is None or left == 1:
            return -(-still // left)
        return self.split // self.max_steps + (step < self.split % self.max_steps)


def cut(answer: Answer, ends: Collection[int]) -> Answer:
    """An answer up to its first end, which stays."""
    count = next((n for n, token in enumerate(answer.tokens, 1) if token in ends), None)
    return Answer(answer.tokens[:count], answer.log_probs[:count], answer.steps)


def dense_logits(model: Any, tokens: Collection[int], seen: "Tensor") -> "Tensor":  # noqa: ANN401
    """[T, V] fp32 logits of every position under a mask of one's own, [T, T] bool."""
    import torch

    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor([list(tokens)]),
            attention_mask=bias[None, None],
            position_ids=torch.arange(len(tokens))[None],
            use_cache=False,
        )
    logits: Tensor = out.logits[0].float()
    return logits
