"""One denoising step over a batch of canvases. Read this first.

      hidden rows [B, L, H]
            |  head            softmax(logits / T): argmax, sample, entropy, soft embedding, where
            |                  T is the rule's temperature for this step
            |                  (a request's bias, masks, top_k ... change the logits in there)
            |  automata        conditions a constrained canvas on being accepted, see ``belief``
            v
      CanvasStats
            |  rule            accepts or reveals positions, renoises the others, decides whether
            |                  the canvas is finished, and what it then commits (``rules``)
            |  corrections     surplus in holes and bad words leave the canvas, and a parser has
            |                  the last word on the text it guards
            v
      Decision ---- observe    whoever wants to watch, see ``trace``
            |  canvas          the pool moves on: next input, history, self-conditioning, phase
            v
      Emission                 tokens of the canvases whose KV was committed in this forward,
                               or, where commits are fused, of those it finished

Takes tensors, gives tensors, never waits for the device on the plain path, and knows nothing of
requests or of vLLM. Which rule it is, the family of the model declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from vllm_diffusion.belief import beliefs, read_rows
from vllm_diffusion.constrain.corrections import enforce, look_ahead, reveal_in_order
from vllm_diffusion.constrain.masked import under_mask
from vllm_diffusion.constrain.slack import without_slack
from vllm_diffusion.constrain.words import UNKNOWN, held_back, repaired, word_ends
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision, Emission, StopReason

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.constrain.automaton.slots import ConstrainedCanvases
    from vllm_diffusion.constrain.guard import Guard
    from vllm_diffusion.constrain.rewrite import BadWords, Rewrite
    from vllm_diffusion.head import Head
    from vllm_diffusion.rules.rule import Rule

Observer: TypeAlias = Callable[["CanvasPool", CanvasBatch, CanvasStats, Decision], None]
"""Sees a step decided and not yet applied; changes nothing. Rows of slots that commit are noise."""


def advance(
    pool: CanvasPool,
    batch: CanvasBatch,
    hidden: Tensor,
    head: Head,
    rule: Rule,
    *,
    rewrite: Rewrite | None = None,
    automata: Sequence[ConstrainedCanvases] = (),
    guards: Mapping[int, Guard] | None = None,
    observe: Observer | None = None,
) -> Emission:
    """Run the head and the rule on the canvases of one forward and move them on.

    Args:
        pool: the canvases' state, changed in place.
        batch: which slots ran, where, and how wide.
        hidden: [B, L, H], final hidden states of every canvas row (anything where not valid).
        head: turns hidden rows into statistics.
        rule: decides what becomes of them.
        rewrite: what the requests change in the distributions; None for nothing at all.
        automata: which canvases obey one, each canvas at most once.
        guards: of the canvases that a grammar guards, by their place in the batch. Such a batch
            waits for the device.
        observe: called between the decision and its effect on the pool.
    """
    slots, (num, length) = batch.slots, batch.position.shape
    temperature, noise = rule.keyed(pool, batch, None if rewrite is None else rewrite.temperature)
    soft_top_k, all_near = rule.soft_embeddings(pool, slots)
    sample_prob, own_prob = rule.probabilities(pool)
    rows = Rows(
        hidden=hidden.reshape(num * length, -1),
        temperature=temperature,
        noise=noise,
        rewrite=rewrite,
        soft_top_k=None if soft_top_k is None else soft_top_k.repeat_interleave(length),
        all_near=all_near,
        self_conditioning=pool.soft_embedding is not None,
        sample_prob=sample_prob,
        own_prob=own_prob,
    )
    known = pool.known(slots)
    read = read_rows(pool, batch, known)
    stats = beliefs(head, rows, num=num, read=read, known=known, automata=automata)
    corrected: dict[int, int] = {}
    if guards:

        def ask(index: Tensor, masks: Sequence[Tensor]) -> CanvasStats:
            return head(replace(rows.take(index), rewrite=under_mask(rewrite, index, masks)))

        says: Literal["argmax", "sample"] = "argmax" if known is None else "sample"
        guards, stats, corrected = look_ahead(
            guards, batch, stats, ask, pool.causal[slots], says=says
        )
    decision = rule.decide(pool, batch, stats)
    if known is not None and rewrite is not None and rewrite.words is not None:
        decision = without_joint_words(pool, batch, decision, rewrite.words, known)
    if rewrite is not None and rewrite.slack is not None:
        commit = without_slack(rewrite.slack, decision.commit.tokens, batch.valid)
        decision = replace(decision, commit=commit)
    if rewrite is not None and rewrite.words is not None:
        stats, decision = without_bad_words(
            pool, batch, stats, decision, rows=rows, head=head, known=known
        )
    if guards and known is not None and pool.mask_id is not None:
        decision = reveal_in_order(
            guards,
            corrected,
            batch,
            stats,
            decision,
            known=known,
            mask_id=pool.mask_id,
            out_of_steps=pool.out_of_steps(slots),
        )
    elif guards:
        same = (stats.argmax == pool.argmax[slots]) | ~batch.valid
        decision = enforce(
            guards,
            corrected,
            batch,
            stats,
            decision,
            unchanged=same.all(dim=1) & (pool.step[slots] > pool.first_step[slots]),
            out_of_steps=pool.out_of_steps(slots),
        )
    if observe is not None:
        observe(pool, batch, stats, decision)
    return pool.apply(batch, stats, decision)


def without_joint_words(
    pool: CanvasPool, batch: CanvasBatch, decision: Decision, words: BadWords, known: Tensor
) -> Decision:
    """Let no positions complete a bad word together, see ``words.held_back``.

    Args:
        pool, batch: as in ``advance``.
        decision: of a rule that reveals.
        words: of the batch.
        known: [B, L] int64, see ``CanvasPool.known``.
    """
    said = torch.where(decision.accept, decision.next_tokens, known)
    later = held_back(words, torch.where(said < 0, UNKNOWN, said), decision.accept)
    later &= ~pool.out_of_steps(batch.slots)[:, None]
    next_tokens = torch.where(later, pool.tokens[batch.slots], decision.next_tokens)
    return replace(
        decision,
        accept=decision.accept & ~later,
        next_tokens=next_tokens,
        finished=decision.finished & ~later.any(dim=1),
        commit=replace(decision.commit, tokens=next_tokens),
    )


def without_bad_words(
    pool: CanvasPool,
    batch: CanvasBatch,
    stats: CanvasStats,
    decision: Decision,
    *,
    rows: Rows,
    head: Head,
    known: Tensor | None = None,
) -> tuple[CanvasStats, Decision]:
    """Let no canvas finish with a bad word in it, see ``constrain.words``.

    A batch that has bad words waits for the device here, once a step.

    Args:
        pool, batch, stats, decision: as in ``advance``.
        rows: [B * L] of the batch; their rewrite has words.
        head: asked for other tokens where a canvas ends at its step limit.
        known: [B, L] int64, see ``CanvasPool.known``. Where something is, no further step would
            change what is revealed, so a canvas that finishes is repaired in any step.
    """
    assert rows.rewrite is not None
    words, commit, slack = rows.rewrite.words, decision.commit, rows.rewrite.slack
    assert words is not None
    said, count = commit.tokens, batch.width if commit.count is None else commit.count
    place = torch.arange(said.shape[1], device=said.device)
    found = (word_ends(words, said) & (place < count[:, None])).any(dim=1)
    must = pool.out_of_steps(batch.slots) if known is None else decision.finished
    decision = replace(
        decision,
        finished=decision.finished & ~found | must,
        # A bad word keeps a canvas from settling: only the step limit ends it.
        reason=torch.where(found, StopReason.STEPS, decision.reason),
    )
    must_end = (found & must & ~pool.causal[batch.slots]).tolist()
    broken = [canvas for canvas, ends in enumerate(must_end) if ends]
    if not broken:
        return stats, decision
    length = batch.position.shape[1]
    said = said.clone()
    several = 1 if known is None else words.rest.shape[2] + 1  # ways to complete a word
    for canvas in broken:
        here = slice(canvas * length, (canvas + 1) * length)
        candidates = head.candidates(rows.take(here), words.last.shape[1] * several + 2)
        if commit.rows is not None and slack is not None:
            # Slack in place of a word's end would bring its neighbours together.
            candidates = candidates.masked_fill(candidates == slack.pad[canvas], -1)
            candidates = candidates[commit.rows[canvas]]
        mine = words.take(slice(canvas, canvas + 1))
        if known is not None:
            stays = known[canvas] >= 0
            stays = stays if commit.rows is None else stays[commit.rows[canvas]]
            said[canvas] = repaired(mine, said[[canvas]], candidates[None], stays[None])[0]
        # Of tokens that stay, slack may have stood between two.
        said[canvas] = repaired(mine, said[[canvas]], candidates[None])[0]
    accept = decision.accept
    if known is not None:
        of_row = place.expand_as(said) if commit.rows is None else commit.rows
        accept = accept.scatter(1, of_row, accept.gather(1, of_row) | (said != commit.tokens))
    if commit.rows is None:
        stats = replace(stats, argmax=said)
    return stats, replace(decision, accept=accept, commit=replace(commit, tokens=said))
