"""The head that materialises logits: readable, exact, the truth other heads are tested against.

It computes in whatever precision its logits come. Given fp64 logits it is the definition.
Memory is bounded by running at most ``max_rows`` rows of the vocabulary at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Final

import torch

from vllm_diffusion.constrain.automaton.class_stats import ClassStats
from vllm_diffusion.constrain.logits import lenient_logits, rewrite_logits, truncate_logits
from vllm_diffusion.head.sample import class_keys, race, sample_rows
from vllm_diffusion.head.soft import most_likely
from vllm_diffusion.records import CanvasStats, TokenScores

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from vllm_diffusion.constrain.rewrite import Rewrite
    from vllm_diffusion.head.rows import Rows

# fp32 tensors of [rows, vocab] that exist at once at most, truncation included.
# Measured by tests/unit/head/test_memory.py.
COPIES: Final = 8
# On a GPU that reads every row in one kernel: as the product gives them, and in fp32.
_COPIES_OF_KERNEL: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceHead:
    """``logits`` and ``soft_embedding`` come from the model; the arithmetic between is here."""

    logits: Callable[[Tensor], Tensor]
    """[R, H] hidden -> [R, V] fp32 logits, softcap applied; changed in place if ids are banned."""
    soft_embedding: Callable[[Tensor], Tensor] | None
    """[R, V] fp32 probabilities -> [R, H], probabilities @ embedding, scaled like an embedding;
    None for a model that is not conditioned on it."""
    max_rows: int
    """Rows of which ``COPIES`` [rows, V] fp32 tensors may exist at once."""
    banned: tuple[int, ...] = ()
    """Ids that no text may hold: their logits count as -inf before everything else."""

    def __call__(self, rows: Rows) -> CanvasStats:
        """See ``Head``."""
        at_once = self.max_rows
        if _in_one_kernel(rows) and rows.rewrite is None:
            at_once *= COPIES // _COPIES_OF_KERNEL
        return CanvasStats.concatenate([self._rows(part) for part in rows.chunks(at_once)])

    def by_class(
        self, rows: Rows, *, class_of: Tensor, num_classes: int
    ) -> tuple[CanvasStats, ClassStats]:
        """See ``Head``."""
        stats, classes = [], []
        for part in rows.chunks(self.max_rows):
            stats.append(self._rows(part))
            logits = self._own(part.hidden)
            classes.append(class_statistics(logits, part, class_of, num_classes))
        return CanvasStats.concatenate(stats), ClassStats.concatenate(classes)

    def candidates(self, rows: Rows, count: int) -> Tensor:
        """See ``Head``."""
        parts = []
        for part in rows.chunks(self.max_rows):
            logits = self._rewritten(part)
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
        pieces = torch.split(hidden, self.max_rows), torch.split(tokens[:, None], self.max_rows)
        for states, chosen in zip(*pieces, strict=True):
            logits = self._own(states)
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

    def _own(self, hidden: Tensor) -> Tensor:
        """[R, V], the model's logits, its banned ids left out."""
        logits = self.logits(hidden)
        for token in self.banned:
            logits[:, token] = -torch.inf
        return logits

    def _draw(self, prob: Tensor, rows: Rows) -> Tensor:
        sample = sample_rows(prob, rows.noise)
        # Of logits that are no numbers it may be no id, and here its probability is looked up.
        return sample.clamp_(max=prob.shape[-1] - 1) if self.banned else sample

    def _rewritten(self, rows: Rows) -> Tensor:
        return _rewritten(self._own(rows.hidden), rows)

    def _rows(self, rows: Rows) -> CanvasStats:
        if not rows.own_prob and not _in_one_kernel(rows):
            # A rewrite's copy of the logits takes their place.
            return self._statistics(self._rewritten(rows), rows)
        own = self._own(rows.hidden)
        logits = _rewritten(own, rows)
        if _in_one_kernel(rows):
            return _on_gpu()(logits, own, rows)
        stats = self._statistics(logits, rows)
        log_prob = own.gather(-1, stats.sample[:, None])[:, 0] - own.logsumexp(dim=-1)
        return replace(stats, own_prob=log_prob.exp())

    def _statistics(self, logits: Tensor, rows: Rows) -> CanvasStats:
        return row_statistics(
            logits,
            rows,
            draw=lambda prob: self._draw(prob, rows),
            soft_embedding=self.soft_embedding,
        )


def _in_one_kernel(rows: Rows) -> bool:
    return rows.hidden.device.type == "cuda" and not rows.self_conditioning


def _on_gpu() -> Callable[[Tensor, Tensor, Rows], CanvasStats]:
    # Imported here because other hosts may have no Triton.
    kernels = import_module("vllm_diffusion.head.reference_kernels")
    statistics: Callable[[Tensor, Tensor, Rows], CanvasStats] = kernels.row_statistics
    return statistics


def _rewritten(logits: Tensor, rows: Rows) -> Tensor:
    return logits if rows.rewrite is None else rewrite_logits(logits, rows.rewrite)


def row_statistics(
    logits: Tensor,
    rows: Rows,
    *,
    draw: Callable[[Tensor], Tensor],
    soft_embedding: Callable[[Tensor], Tensor] | None,
) -> CanvasStats:
    """Statistics of softmax(truncated(logits / temperature)), all ids at once.

    Args:
        logits: [R, N] fp32, or fp64 for the truth; rewritten.
        rows: these rows; the part of their rewrite before the temperature is already applied.
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
    soft = None
    if rows.self_conditioning:
        assert soft_embedding is not None
        soft = soft_embedding(_of_most_likely(prob, argmax, rows.soft_top_k))
    if rewrite is not None:
        sample = kept_token(argmax, sample, rewrite)
    return CanvasStats(
        argmax=argmax,
        sample=sample,
        entropy=entropy,
        top_prob=top[:, 0],
        margin=top[:, 0] - second,
        soft_embedding=soft,
        sample_prob=prob.gather(-1, sample[:, None])[:, 0] if rows.sample_prob else None,
    )


def kept_token(argmax: Tensor, sample: Tensor, rewrite: Rewrite) -> Tensor:
    """[R] int64, the token that counts as drawn: the argmax where a canvas is greedy."""
    if rewrite.greedy is None:
        return sample
    return torch.where(rewrite.greedy[rewrite.canvas], argmax, sample)


def class_statistics(logits: Tensor, rows: Rows, class_of: Tensor, num_classes: int) -> ClassStats:
    """Statistics by class of softmax(lenient(logits) / temperature), a class at a time.

    Args:
        logits: [R, V] fp32, or fp64 for the truth.
        rows: these rows.
        class_of, num_classes: see ``Head.by_class``.
    """
    rewrite, shape = rows.rewrite, (len(logits), num_classes)
    if rewrite is None:
        scaled = logits / rows.temperature[:, None]
    else:
        scaled = lenient_logits(logits, rewrite, rows.temperature)
    log_prob = scaled.log_softmax(dim=-1)
    key = class_keys(rows.noise)
    nobody = torch.full(shape, -1, dtype=torch.int64, device=logits.device)
    nothing = logits.new_full(shape, -torch.inf)
    found = ClassStats(
        log_mass=nothing,
        entropy=logits.new_zeros(shape),
        best=nobody,
        best_log_prob=nothing.clone(),
        second_log_prob=nothing.clone(),
        sample=nobody.clone(),
        sample_log_prob=nothing.clone() if rows.sample_prob else None,
    )
    for number in range(1, num_classes):
        ids = (class_of == number).nonzero()[:, 0]
        if not len(ids):
            continue
        here = log_prob[:, ids]
        top, place = here.max(dim=-1)
        inside = here - top[:, None]
        # A pin leaves other classes no token.
        there = top != -torch.inf
        mass = here.logsumexp(dim=-1)
        share = (here - mass[:, None]).clamp(min=torch.finfo(here.dtype).min)
        drawn = race(inside.exp(), key, ids).argmax(dim=-1)
        found.log_mass[:, number] = mass
        found.entropy[:, number] = torch.where(there, -(share.exp() * share).sum(dim=-1), 0.0)
        found.best[:, number] = torch.where(there, ids[place], -1)
        found.best_log_prob[:, number] = top
        if len(ids) > 1:
            found.second_log_prob[:, number] = here.topk(2, dim=-1).values[:, 1]
        found.sample[:, number] = torch.where(there, ids[drawn], -1)
        if found.sample_log_prob is not None:
            found.sample_log_prob[:, number] = here.gather(1, drawn[:, None])[:, 0]
    if rewrite is None or rewrite.greedy is None:
        return found
    greedy = rewrite.greedy[rewrite.canvas, None]
    found = replace(found, sample=torch.where(greedy, found.best, found.sample))
    if found.sample_log_prob is None:
        return found
    of_best = torch.where(greedy, found.best_log_prob, found.sample_log_prob)
    return replace(found, sample_log_prob=of_best)


def _of_most_likely(prob: Tensor, argmax: Tensor, count: Tensor | None) -> Tensor:
    """[R, V], the weights of a soft embedding, see ``Rows.soft_top_k``."""
    if count is None:
        return prob
    chosen = most_likely(prob, count)
    chosen.scatter_(1, argmax[:, None], value=True)
    kept = prob * chosen
    some = torch.where(chosen.all(dim=1), 1.0, kept.sum(dim=1))
    return kept.div_(some[:, None]) * (count >= 0)[:, None]
