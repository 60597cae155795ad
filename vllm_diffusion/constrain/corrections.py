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

The parser runs on the host. A batch with guarded canvases waits for the device twice in every step,
before the corrections and after the decision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

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
) -> tuple[dict[int, Guard], CanvasStats, dict[int, int]]:
    """Read every guarded canvas that denoises and correct its first illegal row.

    Args:
        guards: by their place in the batch.
        batch: of B canvases.
        stats: of these canvases, [B, L].
        ask: runs the head again on rows [N] int64 of the batch, with a mask [V] bool for each.
        causal: [B] bool, canvases that are being committed: their tokens are already written.

    Returns:
        The guards of the canvases that denoise; the statistics, corrected; the corrected row by
        canvas.
    """
    length, device = stats.argmax.shape[1], stats.argmax.device
    told = torch.cat([stats.argmax, batch.width[:, None], causal[:, None]], dim=1).tolist()
    denoising = {canvas: guard for canvas, guard in guards.items() if not told[canvas][-1]}
    corrected, masks = {}, []
    for canvas, guard in denoising.items():
        *argmax, width, _ = told[canvas]
        guard.rewind()
        row = guard.walk(argmax[:width])
        if row < width:
            corrected[canvas] = row
            masks.append(guard.legal())
    if not corrected:
        return denoising, stats, corrected
    rows = on_device([canvas * length + row for canvas, row in corrected.items()], device)
    again = ask(rows, masks)
    # NaN logits have no best token, and must not stop the canvas: take any legal token.
    legal = upload(torch.stack(masks), device).gather(1, again.argmax[:, None])[:, 0]
    any_legal = on_device([int(mask.int().argmax()) for mask in masks], device)
    again = replace(again, argmax=torch.where(legal, again.argmax, any_legal))
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
    commit = decision.commit
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
