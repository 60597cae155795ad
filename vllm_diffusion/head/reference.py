"""The head that materialises logits: readable, exact, the truth other heads are tested against.

It computes in whatever precision its logits come. Given fp64 logits it is the definition.
Memory is bounded by running at most ``max_rows`` rows of the vocabulary at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.rewrite import rewrite_logits, truncate_logits
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.head.sample import sample_rows
from vllm_diffusion.head.soft import most_likely
from vllm_diffusion.records import CanvasStats, TokenScores

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_diffusion.records import Noise, Rewrite

# fp32 tensors of [rows, vocab] that exist at once at the highest, a cut of the rows included.
# Measured by tests/unit/head/test_memory.py.
COPIES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceHead:
    """``logits`` and ``soft_embedding`` come from the model; the arithmetic between is here."""

    logits: Callable[[Tensor], Tensor]
    """[R, H] hidden -> [R, V] fp32 logits, softcap applied."""
    soft_embedding: Callable[[Tensor], Tensor]
    """[R, V] fp32 probabilities -> [R, H], probabilities @ embedding, scaled like an embedding."""
    max_rows: int
    """Rows whose [rows, V] fp32 tensors may exist at once."""

    def __call__(
        self,
        hidden: Tensor,
        temperature: Tensor,
        noise: Noise,
        rewrite: Rewrite | None = None,
        soft_top_k: Tensor | None = None,
    ) -> CanvasStats:
        """See ``Head``."""
        rows = Rows(
            hidden=hidden,
            temperature=temperature,
            noise=noise,
            rewrite=rewrite,
            soft_top_k=soft_top_k,
        )
        return CanvasStats.concatenate([self._rows(part) for part in rows.chunks(self.max_rows)])

    def candidates(self, hidden: Tensor, rewrite: Rewrite, count: int) -> Tensor:
        """See ``Head``."""
        parts = []
        for rows in self._chunks(hidden):
            logits = rewrite_logits(self.logits(hidden[rows]), rewrite.rows(rows))
            best = logits.topk(min(count, logits.shape[-1]), dim=-1)
            parts.append(best.indices.masked_fill(best.values == -torch.inf, -1))
        return torch.cat(parts)

    def scores(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        count: int,
        ids: tuple[int, ...] | None = None,
        among: bool = False,
        raw_logits: bool = False,
    ) -> TokenScores:
        """See ``Head``."""
        parts = []
        for rows in self._chunks(hidden):
            logits, chosen = self.logits(hidden[rows]), tokens[rows, None]
            if ids is None:
                beside = logits.topk(logits.shape[-1] if count < 0 else count, dim=-1).indices
            else:
                beside = torch.tensor(ids, device=logits.device).expand(len(logits), -1)
            field = logits.gather(-1, beside) if among else logits
            best = logits.gather(-1, chosen)
            listed = torch.cat([chosen, beside], dim=-1)
            values = logits.gather(-1, listed)
            if not raw_logits:
                values -= field.logsumexp(dim=-1, keepdim=True)
            ranks = (field >= best).sum(dim=-1)
            parts.append(TokenScores(ids=listed, values=values, ranks=ranks))
        return TokenScores.concatenate(parts)

    def _chunks(self, hidden: Tensor) -> list[slice]:
        return [
            slice(start, start + self.max_rows)
            for start in range(0, hidden.shape[0], self.max_rows)
        ]

    def _rows(self, rows: Rows) -> CanvasStats:
        logits = self.logits(rows.hidden)
        if rows.rewrite is not None:
            logits = rewrite_logits(logits, rows.rewrite)
        return row_statistics(
            logits,
            rows,
            draw=lambda prob: sample_rows(prob, rows.noise),
            soft_embedding=self.soft_embedding,
        )


def row_statistics(
    logits: Tensor,
    rows: Rows,
    *,
    draw: Callable[[Tensor], Tensor],
    soft_embedding: Callable[[Tensor], Tensor],
) -> CanvasStats:
    """Statistics of softmax(truncated(logits / temperature)), the whole of it at once.

    Args:
        logits: [R, N] fp32, or fp64 for the truth; rewritten.
        rows: these rows; of their rewrite, what comes before the temperature is done.
        draw: [R, N] probabilities -> [R] int64, a column a row.
        soft_embedding: [R, N] probabilities -> [R, H].
    """
    rewrite = rows.rewrite
    scaled = logits / rows.temperature[:, None]
    if rewrite is not None:
        scaled = truncate_logits(scaled, rewrite)
    log_prob = scaled.log_softmax(dim=-1)
    prob = log_prob.exp()
    # -inf logits (masked ids) have probability 0 and contribute 0, not 0 * -inf.
    lowest = torch.finfo(log_prob.dtype).min
    entropy = -log_prob.clamp_(min=lowest).mul_(prob).sum(dim=-1)
    top = prob.topk(min(2, prob.shape[-1]), dim=-1).values
    second = top[:, 1] if top.shape[1] > 1 else torch.zeros_like(top[:, 0])
    argmax, sample = scaled.argmax(dim=-1), draw(prob)
    if rewrite is not None and rewrite.greedy is not None:
        sample = torch.where(rewrite.greedy[rewrite.canvas], argmax, sample)
    return CanvasStats(
        argmax=argmax,
        sample=sample,
        entropy=entropy,
        top_prob=top[:, 0],
        margin=top[:, 0] - second,
        soft_embedding=soft_embedding(_of_most_likely(prob, argmax, rows.soft_top_k)),
    )


def _of_most_likely(prob: Tensor, argmax: Tensor, count: Tensor | None) -> Tensor:
    """What a soft embedding weighs its ids with, see ``Head``."""
    if count is None:
        return prob
    chosen = most_likely(prob, count)
    chosen.scatter_(1, argmax[:, None], value=True)
    kept = prob * chosen
    some = torch.where(chosen.all(dim=1), 1.0, kept.sum(dim=1))
    return kept.div_(some[:, None]) * (count >= 0)[:, None]
