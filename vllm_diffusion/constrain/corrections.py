"""Canvases whose grammar no automaton of a fair size can hold: a parser on the host corrects them.

A parser reads from left to right and a canvas settles anywhere, so a parser cannot condition all of
its rows at once as ``constrain.automaton`` does. It can say how far a canvas is legal:

1. Every step, the parser reads the argmax of a guarded canvas, starting from the committed text.
   The head computes the first illegal row again under the mask of legal ids: all of its statistics
   become those of the masked distribution, and its new argmax is the next input of the row. The
   rows behind it were predicted beside another token. The ordinary rule treats them as usual, and
   they see the correction in the next step.
2. A canvas whose argmax is legal settles by the ordinary rule, and is committed whole.
3. A canvas with a correction finishes when the rule would settle it and nothing has changed since
   the step before, or at the step limit. It commits its rows up to and including the corrected one.
   The rest is denoised again in the next canvas, where the correction is committed text.

So the committed text is always the beginning of a text that the grammar allows, and an end token
follows a complete one. Rows behind the end are free, as are rows beyond the request's budget. If
the budget runs out first, the text stays incomplete. A grammar wins over everything else a request
asks for: bad words and pins hold only where the grammar leaves a choice.

Where noise is masks, what is revealed stays, and what the model says of it there is worth nothing.
Such a canvas is read as its known tokens and the samples of the others, and is revealed from left
to right, as the parser reads: in a step, of the positions that the rule reveals those that follow
on known ones (the first open one always) up to the corrected row. So a revealed token is legal
behind all before it, and none is ever taken back; a draft's may be. The last step reveals
everything that is legal.

The parser runs on the host. A batch with guarded canvases waits for the device twice in every step,
before the corrections and after the decision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from vllm_diffusion.constrain.transfer import on_device, upload
from vllm_diffusion.records import StopReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from vllm_diffusion.constrain.guard import Guard
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision


def look_ahead(
    guards: Mapping[int, Guard],
    batch: CanvasBatch,
    stats: CanvasStats,
    ask: Callable[[Tensor, Sequence[Tensor]], CanvasStats],
    causal: Tensor,
    *,
    says: Literal["argmax", "sample"] = "argmax",
) -> tuple[dict[int, Guard], CanvasStats, dict[int, int]]:
    """Read every guarded canvas that denoises and correct its first illegal row.

    Args:
        guards: by their place in the batch.
        batch: of B canvases.
        stats: of these canvases, [B, L].
        ask: runs the head again on rows [N] int64 of the batch, with a mask [V] bool for each.
        causal: [B] bool, canvases that are being committed: their tokens are already written.
        says: which of the statistics a canvas would say.

    Returns:
        The guards of the canvases that denoise; the statistics, corrected; the corrected row by
        canvas.
    """
    length, device = stats.argmax.shape[1], stats.argmax.device
    told = torch.cat([getattr(stats, says), batch.width[:, None], causal[:, None]], dim=1).tolist()
    denoising = {canvas: guard for canvas, guard in guards.items() if not told[canvas][-1]}
    corrected, masks = {}, []
    for canvas, guard in denoising.items():
        *said, width, _ = told[canvas]
        guard.rewind()
        row = guard.walk(said[:width])
        if row < width:
            corrected[canvas] = row
            masks.append(guard.legal())
    if not corrected:
        return denoising, stats, corrected
    rows = on_device([canvas * length + row for canvas, row in corrected.items()], device)
    again = ask(rows, masks)
    # NaN logits have no best token, and must not stop the canvas: take any legal token.
    best = getattr(again, says)
    legal = upload(torch.stack(masks), device).gather(1, best[:, None])[:, 0]
    any_legal = on_device([int(mask.int().argmax()) for mask in masks], device)
    again = replace(again, **{says: torch.where(legal, best, any_legal)})
    return denoising, stats.replaced(rows, again), corrected


def enforce(
    guards: Mapping[int, Guard],
    corrected: Mapping[int, int],
    batch: CanvasBatch,
    stats: CanvasStats,
    decision: Decision,
    *,
    unchanged: Tensor,
    out_of_steps: Tensor,
) -> Decision:
    """Hold the corrections of guarded canvases, and let nothing illegal settle or be committed.

    Args:
        guards, batch: as for ``look_ahead``. The guard of a canvas that finishes is moved on.
        corrected: the rows that ``look_ahead`` corrected.
        stats: of the step, corrected.
        decision: of the rule.
        unchanged: [B] bool, the corrected argmax equals that of the step before.
        out_of_steps: [B] bool, canvases that must end.
    """
    held = torch.zeros_like(batch.valid)
    for canvas, row in corrected.items():
        held[canvas, row] = True
    may_end = ~held.any(dim=1) | unchanged
    finished = decision.finished & (may_end | out_of_steps)
    decision = replace(
        decision,
        accept=decision.accept | held,
        next_tokens=torch.where(held, stats.argmax, decision.next_tokens),
        finished=finished,
        reason=torch.where(may_end, decision.reason, StopReason.STEPS),
    )
    return _written(guards, corrected, batch, decision)


def reveal_in_order(
    guards: Mapping[int, Guard],
    corrected: Mapping[int, int],
    batch: CanvasBatch,
    stats: CanvasStats,
    decision: Decision,
    *,
    known: Tensor,
    mask_id: int,
    out_of_steps: Tensor,
) -> Decision:
    """Reveal guarded canvases from left to right, as far as they are legal.

    Args:
        guards, corrected, batch, stats, decision, out_of_steps: as for ``enforce``.
        known: [B, L] int64, tokens that stay, -1 where there are masks.
        mask_id: of the masks.
    """
    num, length = known.shape
    device = known.device
    guarded = on_device([canvas in guards for canvas in range(num)], device, torch.bool)[:, None]
    row = on_device([corrected.get(canvas, length) for canvas in range(num)], device)[:, None]
    place = torch.arange(length, device=device)
    legal, held = place <= row, place == row
    is_open = (known < 0) & batch.valid
    first = is_open & (is_open.cumsum(dim=1) == 1)
    reveals = decision.accept | first | out_of_steps[:, None]
    reached = (~is_open | reveals).long().cumprod(dim=1).bool() & legal
    accept = torch.where(guarded, is_open & reached, decision.accept)
    said = torch.where(accept | held & reached, stats.sample, known)
    # A known token that is not legal, a draft's, becomes a mask, which the model was trained on.
    opened = guarded & held & reached & (known >= 0) & ~out_of_steps[:, None]
    said = said.masked_fill(opened | (said < 0), mask_id)
    next_tokens = torch.where(guarded, said, decision.next_tokens)
    whole = (reached & ~opened | ~batch.valid).all(dim=1)
    finished = torch.where(guarded[:, 0], whole | out_of_steps, decision.finished)
    decision = replace(
        decision,
        accept=accept,
        next_tokens=next_tokens,
        finished=finished,
        reason=torch.where(guarded[:, 0] & ~whole, StopReason.STEPS, decision.reason),
        commit=replace(decision.commit, tokens=next_tokens),
    )
    return _written(guards, corrected, batch, decision)


def _written(
    guards: Mapping[int, Guard],
    corrected: Mapping[int, int],
    batch: CanvasBatch,
    decision: Decision,
) -> Decision:
    """The decision with commits that are legal; the guards of canvases that finish move on."""
    commit, finished = decision.commit, decision.finished
    whole = batch.width if commit.count is None else commit.count
    read = torch.cat([commit.tokens, whole[:, None], finished[:, None]], dim=1).tolist()
    tokens, count = commit.tokens.clone(), whole.clone()
    changed = False
    for canvas, guard in guards.items():
        *text, asked, finishes = read[canvas]
        if not finishes:
            continue
        guard.rewind()
        end = min(asked, corrected.get(canvas, asked) + 1)
        legal = guard.walk(text[:end])
        if not legal:
            # A bad word was taken out of the first row, and the grammar leaves nothing else there.
            best = int(guard.legal().int().argmax())
            text[0] = tokens[canvas, 0] = best
            legal = 1
            changed = True
        changed |= legal < asked
        count[canvas] = legal
        guard.write(text[:legal])
    if changed:
        decision = replace(decision, commit=replace(commit, tokens=tokens, count=count))
    return decision
