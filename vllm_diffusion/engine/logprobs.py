"""Log-probabilities of committed tokens: computed when a canvas finishes, sent with its tokens.

A canvas commits the argmax of its last step, or a part of it, so the log-probabilities come from
that step's logits. vLLM expects them with the tokens. A separate commit emits the tokens one
forward later; until then the log-probabilities wait here by slot. Batches without such requests
compute nothing. A batch with one syncs with the device once per step, to learn which canvases have
finished. Those are scored together, since the cost is reading the vocabulary and not the rows.
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
"""Least number of rows scored per canvas: products of fewer rows round differently, and a request
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
class _Finished:
    """A finished canvas to score, R of its tokens."""

    slot: int
    asked: _Asked
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
        """Score the canvases finished in this step; return the scores of the emitted tokens.

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
        # The only device sync.
        ends = torch.stack([waits, fused, pool.count[batch.slots]]).tolist()
        finished, at_once = [], set()
        for row, (slot, stays, leaving, count) in enumerate(zip(slots, *ends, strict=True)):
            if (stays or leaving) and (asked := self._asked.get(slot)) is not None:
                rows = pool.rows[slot, : count if asked.most is None else min(count, asked.most)]
                finished.append(
                    _Finished(
                        slot=slot,
                        asked=asked,
                        hidden=hidden[row, rows],
                        tokens=said[row, : len(rows)],
                    )
                )
                if leaving:
                    at_once.add(slot)
        for slot, scores in self._scored(finished, head):
            (leaves if slot in at_once else self._waiting)[slot] = scores
        return _in_order([leaves.get(slot) for slot in requests])

    def _scored(
        self, finished: Sequence[_Finished], head: Head
    ) -> Iterator[tuple[int, TokenScores]]:
        """Scores of the canvases, by slot."""
        for group, ids in _scored_together(finished):
            scores = head.scores(
                torch.cat([each.hidden for each in group]),
                torch.cat([each.tokens for each in group]),
                count=group[0].asked.count,
                ids=ids,
                among=group[0].asked.among,
                raw_logits=self.raw_logits,
            )
            start = 0
            for each in group:
                rows = slice(start, start + len(each.tokens))
                start = rows.stop
                yield each.slot, _part(scores, rows, each.asked.ids, ids)


def _scored_together(
    finished: Sequence[_Finished],
) -> Iterator[tuple[list[_Finished], tuple[int, ...] | None]]:
    """Groups of canvases scored in one pass over the vocabulary, with their joint ids."""
    alike: dict[_Asked, list[_Finished]] = {}
    group: list[_Finished] = []
    ids: dict[int, None] = {}
    for each in finished:
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
