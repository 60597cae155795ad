"""Log-probabilities of committed tokens: taken where a canvas finishes, sent with its tokens.

What is committed is the argmax of a canvas's last step, or what is left of it, so its
log-probabilities are those of that step's logits. vLLM wants them with the tokens. Those of a
separate commit leave one forward later, so they wait here by slot. Nothing is computed for batches
in which nobody asks; one that asks waits for the device once a step, to learn which canvases have
finished. These are scored together: what costs is reading the vocabulary, not the rows.
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
"""Rows of a canvas that are scored at least: products of fewer rows are rounded otherwise, and a
request would get other numbers alone than among others."""

_MOST_IDS: Final = 128
"""Ids that rows are scored for at once, as many as vLLM lets one request ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What a request wants to know about every token."""

    count: int  # the most likely ids; -1 for the whole vocabulary
    ids: tuple[int, ...] | None  # these ids instead
    among: bool  # of the distribution over ``ids`` alone
    most: int | None  # tokens that can leave of its only canvas; None where all may


@dataclass(frozen=True, slots=True, kw_only=True)
class _Finished:
    """A canvas that is to be scored. R of its tokens."""

    slot: int
    asked: _Asked
    hidden: Tensor  # [R, H]
    tokens: Tensor  # [R] int64


class CanvasLogprobs:
    """The requests that ask for log-probabilities, and those that wait for their tokens.

    Args:
        raw_logits: hand out logits instead, vLLM's ``logprobs_mode`` "raw_logits".
    """

    def __init__(self, *, raw_logits: bool) -> None:
        self.raw_logits = raw_logits
        self._asked: dict[int, _Asked] = {}
        self._waiting: dict[int, TokenScores] = {}

    def admit(self, slot: int, sampling: Any, admitted: Admitted) -> None:
        """Give the slot to a request, whatever its last owner asked for or still waits for."""
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
        """Finished, aborted or preempted: nothing of it may reach the slot's next owner."""
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
        """Score the canvases that this step has finished; what belongs to the tokens that leave.

        A canvas that waits for its commit is committed the next time its slot runs, so every slot
        of the step that waits emits now.

        Args:
            requests: slots of the requests of the step, in their order; -1 for one without canvas
                rows.
            slots: the B slots of the batch, on the host.
            batch: the same batch on the device.
            hidden: [B, L, H], the step's hidden rows.
            emission: what the batch emits.
            pool: the canvases, one step on.
            head: gives the scores.
        """
        if self._asked.keys().isdisjoint(slots):
            return None
        leaves = {slot: self._waiting.pop(slot) for slot in slots if slot in self._waiting}
        waits = pool.causal[batch.slots]
        fused = pool.fused[batch.slots] & (emission.count > 0)
        said = torch.where(fused[:, None], emission.tokens, pool.tokens[batch.slots])
        # The one thing that is read back.
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
        """The scores of every canvas by its slot."""
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
    """Canvases that one reading of the vocabulary serves, and the ids that it asks for."""
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
    """These rows alone, and beside their tokens ``some`` of the ``ids`` that were scored."""
    part = TokenScores(ids=scores.ids[rows], values=scores.values[rows], ranks=scores.ranks[rows])
    if some is None or ids is None or some == ids:
        return part
    place = {token: at for at, token in enumerate(ids, start=1)}
    columns = on_device([0, *(place[token] for token in some)], part.ids.device)
    return replace(part, ids=part.ids[:, columns], values=part.values[:, columns])


def _in_order(scores: Sequence[TokenScores | None]) -> LogprobsTensors | None:
    """The scores of the requests of a step as vLLM takes them; None if there are none."""
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
