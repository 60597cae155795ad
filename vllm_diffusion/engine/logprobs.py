"""Log-probabilities of committed tokens, computed at the step that decides them.

A rule may commit the argmax of a canvas's last step, or a part of it: then they come from that
step's logits. Or it reveals position by position: then each comes from the step that revealed it,
because a row that already holds its token says nothing about it. Only a token that was given in
advance is scored in the last step.

vLLM expects them with the tokens; until these leave they wait here by slot. Batches without such
requests compute nothing. A batch with one syncs with the device once per step, to learn what was
decided. That is scored together, since the cost is reading the vocabulary and not the rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional
from vllm.v1.outputs import LogprobsTensors

from vllm_diffusion.constrain.transfer import on_device
from vllm_diffusion.records import TokenScores

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.head import Head
    from vllm_diffusion.records import CanvasBatch, Emission
    from vllm_diffusion.request.admitted import Admitted

_FEWEST: Final = 4
"""Least number of rows scored at once: products of fewer rows round differently, and a request
would get different numbers alone and in a batch."""

_MOST_IDS: Final = 128
"""Most ids scored at once: the number that vLLM lets one request ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The log-probabilities that a request wants for every token."""

    count: int  # number of most likely ids; -1 for the whole vocabulary
    ids: tuple[int, ...] | None  # these ids instead
    among: bool  # normalised over ``ids`` only
    most: int | None  # most tokens its only canvas can emit; None for no limit


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decided:
    """R tokens of a canvas to score."""

    slot: int
    asked: _Asked
    rows: list[int]  # of the canvas, R
    hidden: Tensor  # [R, H]
    tokens: Tensor  # [R] int64


class CanvasLogprobs:
    """The requests that ask for log-probabilities, and the scores that wait for their tokens.

    Args:
        raw_logits: return logits instead, vLLM's ``logprobs_mode`` "raw_logits".
    """

    def __init__(self, *, raw_logits: bool) -> None:
        self.raw_logits = raw_logits
        self._asked: dict[int, _Asked] = {}
        self._waiting: dict[int, TokenScores] = {}
        self._scored: dict[int, list[tuple[list[int], TokenScores]]] = {}
        """By slot, scores of tokens of its canvas, with the rows that these stand in."""

    def admit(self, slot: int, sampling: Any, admitted: Admitted) -> None:
        """Give the slot to a request and drop everything of its last owner."""
        self.release(slot)
        if sampling.num_logprobs is not None:
            ids = sampling.logprob_token_ids
            limit = sampling.max_tokens if admitted.read_only else None
            self._asked[slot] = _Asked(
                count=sampling.num_logprobs,
                ids=tuple(ids) if ids else None,
                among=admitted.constrained,
                most=None if limit is None else max(limit, _FEWEST),
            )

    def release(self, slot: int) -> None:
        """Drop the owner's state once it is finished, aborted or preempted."""
        self._asked.pop(slot, None)
        self._waiting.pop(slot, None)
        self._scored.pop(slot, None)

    def leaving(
        self,
        requests: Sequence[int],
        slots: Sequence[int],
        batch: CanvasBatch,
        hidden: Tensor,
        emission: Emission,
        *,
        pool: CanvasPool,
        head: Head,
    ) -> LogprobsTensors | None:
        """Score what was decided in this step; return the scores of the emitted tokens.

        A canvas awaiting its commit is committed the next time its slot runs, so every waiting slot
        of the step emits now.

        Args:
            requests: slots of the step's requests, in order; -1 for one without canvas rows.
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
            hidden: [B, L, H], the step's hidden rows.
            emission: the batch's emission.
            pool: the canvases after the step.
            head: computes the scores.
        """
        if self._asked.keys().isdisjoint(slots):
            return None
        leaves = {slot: self._waiting.pop(slot) for slot in slots if slot in self._waiting}
        waits = pool.causal[batch.slots]
        fused = pool.fused[batch.slots] & (emission.count > 0)
        said = torch.where(fused[:, None], emission.tokens, pool.tokens[batch.slots])
        revealed = torch.zeros_like(batch.valid)
        if emission.revealed is not None:
            revealed = emission.revealed & batch.valid
        of = batch.slots
        # The only device sync.
        ends = torch.cat(
            [
                torch.stack([waits, fused, pool.count[of]], dim=1),
                pool.rows[of],
                revealed,
            ],
            dim=1,
        ).tolist()
        decided, finished, length = [], {}, pool.canvas_length
        for row, (slot, (stays, leaving, count, *rows)) in enumerate(zip(slots, ends, strict=True)):
            if (asked := self._asked.get(slot)) is None:
                continue
            scored = self._scored.setdefault(slot, [])
            now = {at: at for at, here in enumerate(rows[length:]) if here}
            if stays or leaving:
                kept = rows[: count if asked.most is None else min(count, asked.most)]
                finished[slot] = kept, leaving
                before = {at for part, _ in scored for at in part} - now.keys()
                # What is committed may stand elsewhere than its row.
                now = {at: place for place, at in enumerate(kept) if at not in before}
            if now:
                index = on_device([[*now], [*now.values()]], said.device)
                decided.append(
                    _Decided(
                        slot=slot,
                        asked=asked,
                        rows=[*now],
                        hidden=hidden[row, index[0]],
                        tokens=said[row, index[1]],
                    )
                )
        self._score(decided, head)
        for slot, (kept, leaving) in finished.items():
            (leaves if leaving else self._waiting)[slot] = _of_rows(kept, self._scored.pop(slot))
        return _in_order([leaves.get(slot) for slot in requests])

    def _score(self, decided: Sequence[_Decided], head: Head) -> None:
        """Keep the scores by slot."""
        for group, ids in _scored_together(decided):
            hidden = torch.cat([each.hidden for each in group])
            tokens = torch.cat([each.tokens for each in group])
            if (missing := _FEWEST - len(tokens)) > 0:
                hidden = functional.pad(hidden, (0, 0, 0, missing))
                tokens = functional.pad(tokens, (0, missing))
            scores = head.scores(
                hidden,
                tokens,
                count=group[0].asked.count,
                ids=ids,
                among=group[0].asked.among,
                raw_logits=self.raw_logits,
            )
            start = 0
            for each in group:
                rows = slice(start, start + len(each.tokens))
                start = rows.stop
                part = _part(scores, rows, each.asked.ids, ids)
                self._scored[each.slot].append((each.rows, part))


def _of_rows(kept: list[int], parts: Sequence[tuple[list[int], TokenScores]]) -> TokenScores:
    """The scores of these rows of a canvas, in their order."""
    scores = TokenScores.concatenate([part for _, part in parts])
    place = {row: at for at, row in enumerate(row for rows, _ in parts for row in rows)}
    order = [place[row] for row in kept]
    if order == [*range(len(place))]:
        return scores
    return scores.take(on_device(order, scores.ids.device))


def _scored_together(
    decided: Sequence[_Decided],
) -> Iterator[tuple[list[_Decided], tuple[int, ...] | None]]:
    """Groups of canvases scored in one pass over the vocabulary, with their joint ids."""
    alike: dict[_Asked, list[_Decided]] = {}
    group: list[_Decided] = []
    ids: dict[int, None] = {}
    for each in decided:
        if each.asked.ids is None or each.asked.among:
            alike.setdefault(replace(each.asked, most=None), []).append(each)
            continue
        union = ids | dict.fromkeys(each.asked.ids)
        if group and len(union) > _MOST_IDS:
            yield group, tuple(ids)
            group, union = [], dict.fromkeys(each.asked.ids)
        group.append(each)
        ids = union
    if group:
        yield group, tuple(ids)
    for asked, group in alike.items():
        yield group, asked.ids


def _part(
    scores: TokenScores, rows: slice, some: tuple[int, ...] | None, ids: tuple[int, ...] | None
) -> TokenScores:
    """The scores of these rows, for their tokens and for ``some`` of the scored ``ids``."""
    part = TokenScores(ids=scores.ids[rows], values=scores.values[rows], ranks=scores.ranks[rows])
    if some is None or ids is None or some == ids:
        return part
    place = {token: at for at, token in enumerate(ids, start=1)}
    columns = on_device([0, *(place[token] for token in some)], part.ids.device)
    return replace(part, ids=part.ids[:, columns], values=part.values[:, columns])


def _in_order(scores: Sequence[TokenScores | None]) -> LogprobsTensors | None:
    """The scores of a step's requests in vLLM's format; None if there are none."""
    first, parts, start = [], [], 0
    for each in scores:
        first.append(start)
        if each is not None:
            parts.append(each)
            start += each.ids.shape[0]
    if not parts:
        return None
    # Requests may ask for different counts; vLLM reads no more of a row than its request wants.
    width = max(part.ids.shape[1] for part in parts)
    return LogprobsTensors(
        logprob_token_ids=torch.cat([_padded(part.ids, width, 0) for part in parts]),
        logprobs=torch.cat([_padded(part.values, width, -torch.inf) for part in parts]),
        selected_token_ranks=torch.cat([part.ranks for part in parts]),
        cu_num_generated_tokens=first,
    )


def _padded(values: Tensor, width: int, value: float) -> Tensor:
    return functional.pad(values, (0, width - values.shape[1]), value=value)
