"""One denoising step over a batch of canvases. Read this first.

      hidden rows [B, L, H]
            |  head            softmax(logits / T(step)): argmax, sample, entropy, soft embedding
            |                  (the request's bias, masks, top_k ... change the logits in there)
            |  automata        a canvas that must obey is conditioned on being accepted, ``belief``
            v
      CanvasStats
            |  accept          the surest keep their sample, what has held its argmax ...
            |  renoise         ... the others become uniform noise
            |  stop            argmax unchanged and entropy low, or no doubt left, or out of steps
            |                  (what a text with holes has too much is taken out of its canvas)
            |                  (a guarded canvas is corrected, and committed as far as it is legal)
            v
      Decision ---- observe    whoever wants to watch, see ``trace``
            |  canvas          the pool moves on: next input, history, self-conditioning, phase
            v
      Emission                 tokens of the canvases whose KV was committed in this forward;
                               of those it finished, where commits are fused

The rule is the published one of DiffusionGemma (entropy-bounded sampling, arXiv 2505.24857) and two
additions that save forwards, off unless a request's constants switch them on (docs/decoding.md).
Takes tensors, gives tensors, never waits for the device, knows nothing of requests or of vLLM.
What is here in torch is the definition, and what a CPU runs. A GPU runs what every step has beside
the head (``keyed``, ``decide``, the pool) as kernels that are held to it, see ``Forms``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from vllm_diffusion.belief import beliefs, read_rows, said_of, soft_embeddings
from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.constrain.guard import Guard, look_ahead, obedient, under_mask
from vllm_diffusion.constrain.slack import without_slack
from vllm_diffusion.constrain.words import of_canvas, repaired, word_ends
from vllm_diffusion.denoise.accept import entropy_bound, held
from vllm_diffusion.denoise.renoise import uniform_tokens
from vllm_diffusion.denoise.schedule import linear_temperature
from vllm_diffusion.denoise.stop import stable_and_confident, sure_at_once
from vllm_diffusion.head.rows import Rows
from vllm_diffusion.records import (
    CanvasBatch,
    CanvasStats,
    Decision,
    Emission,
    Noise,
    Rewrite,
    StopReason,
)

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.automaton.slots import ConstrainedCanvases
    from vllm_diffusion.head import Head

Rule: TypeAlias = Callable[["CanvasPool", CanvasBatch, CanvasStats], Decision]
"""What becomes of the canvases of a step; ``decide`` is one."""

Observer: TypeAlias = Callable[["CanvasPool", CanvasBatch, CanvasStats, Decision], None]
"""Sees a step decided and not yet applied; changes nothing. Rows of slots that commit are noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forms:
    """What every step runs, whatever its requests ask for, in the form that suits the device."""

    keyed: Callable[[CanvasPool, CanvasBatch, Tensor | None], tuple[Tensor, Noise]]
    decide: Rule
    apply: Callable[[CanvasPool, CanvasBatch, CanvasStats, Decision], Emission]
    begin: Callable[[CanvasPool, Tensor, Tensor], None]

    @staticmethod
    def on(device_type: str) -> Forms:
        """Kernels on a GPU, the definitions elsewhere."""
        if device_type != "cuda":
            return Forms(keyed=keyed, decide=decide, apply=CanvasPool.apply, begin=CanvasPool.begin)
        # Elsewhere there may be no Triton.
        from vllm_diffusion import canvas_kernels, step_kernels

        return Forms(
            keyed=step_kernels.keyed,
            decide=step_kernels.decide,
            apply=canvas_kernels.apply,
            begin=canvas_kernels.begin,
        )


def advance(
    pool: CanvasPool,
    batch: CanvasBatch,
    hidden: Tensor,
    head: Head,
    *,
    rewrite: Rewrite | None = None,
    automata: Sequence[ConstrainedCanvases] = (),
    guards: Mapping[int, Guard] | None = None,
    rule: Rule | None = None,
    observe: Observer | None = None,
) -> Emission:
    """Run the head and the rule on the canvases of one forward and move them on.

    Args:
        pool: the canvases' state, changed in place.
        batch: which slots ran, where, and how wide.
        hidden: [B, L, H], final hidden states of every canvas row (anything where not valid).
        head: turns hidden rows into statistics.
        rewrite: what the requests change in the distributions; None for nothing at all.
        automata: which canvases obey one, each canvas at most once.
        guards: of the canvases that a grammar guards, by their place in the batch. Such a batch
            waits for the device.
        rule: instead of ``decide``.
        observe: called between the decision and its effect on the pool.
    """
    slots, (num, length) = batch.slots, batch.position.shape
    forms = Forms.on(pool.device.type)
    temperature, noise = forms.keyed(pool, batch, None if rewrite is None else rewrite.temperature)
    rows = Rows(
        hidden=hidden.reshape(num * length, -1),
        temperature=temperature,
        noise=noise,
        rewrite=rewrite,
        soft_top_k=soft_embeddings(pool, slots, published=rule is None, length=length),
        all_near=pool.all_near,
    )
    read = read_rows(pool, batch)
    stats = beliefs(head, rows, num=num, read=read, automata=automata)
    corrected: dict[int, int] = {}
    if guards:

        def ask(index: Tensor, masks: Sequence[Tensor]) -> CanvasStats:
            asked = replace(rows.take(index), rewrite=under_mask(rewrite, index, masks))
            return said_of(head, asked)

        guards, stats, corrected = look_ahead(guards, batch, stats, ask, pool.causal[slots])
    decision = (rule or forms.decide)(pool, batch, stats)
    if rewrite is not None and rewrite.slack is not None:
        commit = without_slack(rewrite.slack, stats.argmax, batch.valid)
        decision = replace(decision, commit=commit)
    if rewrite is not None and rewrite.words is not None:
        stats, decision = without_bad_words(
            pool, batch, stats, decision, rows=rows.hidden, head=head, rewrite=rewrite
        )
    if guards:
        same = (stats.argmax == pool.argmax[slots]) | ~batch.valid
        decision = obedient(
            guards,
            corrected,
            batch,
            stats,
            decision,
            rests=same.all(dim=1) & (pool.step[slots] > pool.first_step[slots]),
            out_of_steps=pool.step[slots] + 1 >= pool.max_steps[slots],
        )
    if observe is not None:
        observe(pool, batch, stats, decision)
    return forms.apply(pool, batch, stats, decision)


def keyed(
    pool: CanvasPool, batch: CanvasBatch, factor: Tensor | None = None
) -> tuple[Tensor, Noise]:
    """Temperature [R] fp32 and noise key of all R = B * L rows of a batch.

    Args:
        pool: the canvases' state.
        batch: of B canvases.
        factor: [B] fp32, of the schedule's temperature; None for 1.
    """
    slots, length = batch.slots, batch.position.shape[1]
    temperature = linear_temperature(
        pool.step[slots], pool.max_steps[slots], pool.t_min[slots], pool.t_max[slots]
    )
    if factor is not None:
        temperature = temperature * factor
    noise = Noise(
        seed=pool.seed[slots].repeat_interleave(length, dim=0),
        position=batch.position.flatten(),
        step=pool.step[slots].repeat_interleave(length),
    )
    return temperature.repeat_interleave(length), noise


def decide(pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
    """Accept, renoise, stop: the rule that the constants of each slot describe."""
    slots = batch.slots
    sure = entropy_bound(stats.entropy, pool.entropy_bound[slots], batch.valid)
    last = pool.argmax[slots], pool.top_prob[slots]
    kept = held(stats.argmax, stats.top_prob, *last, pool.hold_threshold[slots], batch.valid)
    noise = uniform_tokens(pool.seed[slots], batch.position, pool.step[slots], pool.vocab_size)
    settled = stable_and_confident(
        stats.argmax,
        pool.history[slots],
        stats.entropy,
        pool.confidence_threshold[slots],
        batch.valid,
        pool.stability[slots],
    ) | sure_at_once(
        stats.argmax,
        stats.top_prob,
        *last,
        pool.doubt_threshold[slots],
        batch.valid,
    )
    out_of_steps = pool.step[slots] + 1 >= pool.max_steps[slots]
    return Decision(
        accept=sure | kept,
        next_tokens=torch.where(sure, stats.sample, torch.where(kept, stats.argmax, noise)),
        finished=settled | out_of_steps,
        reason=torch.where(settled, StopReason.SETTLED, StopReason.STEPS),
    )


def without_bad_words(
    pool: CanvasPool,
    batch: CanvasBatch,
    stats: CanvasStats,
    decision: Decision,
    *,
    rows: Tensor,
    head: Head,
    rewrite: Rewrite,
) -> tuple[CanvasStats, Decision]:
    """Let no canvas finish with a bad word in it, see ``constrain.words``.

    A batch that has bad words waits for the device here, once a step.

    Args:
        pool, batch, stats, decision: as in ``advance``.
        rows: [B * L, H] hidden states.
        head: asked for other tokens where a canvas ends at its step limit.
        rewrite: of the batch, with words.
    """
    words, commit, slack = rewrite.words, decision.commit, rewrite.slack
    assert words is not None
    said, count = (stats.argmax, batch.width) if commit is None else (commit.tokens, commit.count)
    place = torch.arange(said.shape[1], device=said.device)
    found = (word_ends(words, said) & (place < count[:, None])).any(dim=1)
    out_of_steps = pool.step[batch.slots] + 1 >= pool.max_steps[batch.slots]
    decision = replace(
        decision,
        finished=decision.finished & ~found | out_of_steps,
        # A bad word keeps a canvas from settling: only the step limit ends it.
        reason=torch.where(found, StopReason.STEPS, decision.reason),
    )
    must_end = (found & out_of_steps & ~pool.causal[batch.slots]).tolist()
    broken = [canvas for canvas, ends in enumerate(must_end) if ends]
    if not broken:
        return stats, decision
    length = batch.position.shape[1]
    said = said.clone()
    for canvas in broken:
        here = slice(canvas * length, (canvas + 1) * length)
        candidates = head.candidates(rows[here], rewrite.rows(here), words.last.shape[1] + 2)
        if commit is not None and slack is not None:
            # Slack in place of a word's end would bring its neighbours together.
            candidates = candidates.masked_fill(candidates == slack.pad[canvas], -1)
            candidates = candidates[commit.rows[canvas]]
        said[canvas] = repaired(of_canvas(words, canvas), said[[canvas]], candidates[None])[0]
    if commit is None:
        return replace(stats, argmax=said), decision
    return stats, replace(decision, commit=replace(commit, tokens=said))
