"""A canvas that obeys a grammar which no automaton of a fair size can hold: a parser guards it.

A parser reads from left to right and a canvas settles anywhere, so a parser cannot condition all of
its rows at once as ``constrain.automaton`` does. It can say how far a canvas is legal:

1. Every step, the argmax of a guarded canvas is read from the committed text on. The first row
   that may not stand there is asked again under the mask of what may: all of its statistics become
   those of the masked distribution, and its new argmax is the next input of the row. Reading goes
   on behind it, up to ``CORRECTIONS`` times. What is illegal behind that follows from tokens that
   are about to change: it is left to the ordinary rule.
2. A canvas settles only if all of it is legal, corrections in.
3. At the step limit it commits the rows that are legal, corrections in, at least one. The rest is
   denoised again, as part of the next canvas.

So whatever is committed is the beginning of a text that the grammar allows, and behind a complete
one stands an end token. What follows the end is free, as are rows that the request's budget does
not reach. A budget may run out before the text is complete: then it is a beginning, no more. A
constraint wins over every other wish, so bad words and pins hold only where the grammar leaves a
choice.

The parser is on the host: a batch with guarded canvases waits for the device in every step.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from vllm_diffusion.records import Commit, Penalties, Rewrite, StopReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from xgrammar import GrammarMatcher

    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision

CORRECTIONS: Final = 1
"""Rows of a canvas that are corrected in a step."""


class Guard:
    """The parser of one request: it stands behind the committed text and looks ahead from there.

    Args:
        parser: has read nothing; see ``grammar.GrammarCompiler``.
        end_tokens: ids that end a text, those of the parser.
        silent: ids that write nothing and so stand nowhere but behind the end.
        vocab_size: ids there are.
        tokens_left: that the request may write; None for any number.
        written: the tokens it has written before, for one that comes back.
    """

    def __init__(
        self,
        parser: GrammarMatcher,
        *,
        end_tokens: Sequence[int],
        silent: frozenset[int] = frozenset(),
        vocab_size: int,
        tokens_left: int | None = None,
        written: Sequence[int] = (),
    ) -> None:
        self._parser = parser
        self._ends = frozenset(end_tokens)
        self._silent = silent - self._ends
        self._left = sys.maxsize if tokens_left is None else tokens_left + len(written)
        self._words = torch.empty(1, -(-vocab_size // 32), dtype=torch.int32)
        self._vocab_size = vocab_size
        self._ahead = 0  # tokens that the parser has read beyond the committed ones
        # The text came to where no token leads on, and was ended there.
        self._given_up = self._given_up_ahead = False
        if written:
            self.write(written)

    def walk(self, tokens: Sequence[int]) -> int:
        """Look ahead along some tokens; how many of them may stand there, counted from the first.

        Goes on from where the last look ahead came to. Behind the end of the text, or of what the
        request may write, every token may stand.
        """
        for place, token in enumerate(tokens):
            if self.is_over():
                break
            if not self._reads(token):
                return place
        return len(tokens)

    def legal(self) -> Tensor:
        """[V] bool: the ids that may stand where the look ahead came to, at least one.

        A grammar may lead to where no token of the vocabulary goes on. Then the text ends.
        """
        self._words.fill_(-1)
        self._parser.fill_next_token_bitmask(self._words)
        bits = np.unpackbits(
            self._words.numpy().view(np.uint8), count=self._vocab_size, bitorder="little"
        )
        mask = torch.from_numpy(bits).bool()
        if not mask.any():
            mask[list(self._ends)] = True
        return mask

    def rewind(self) -> None:
        """Forget what was looked ahead at."""
        if self._ahead:
            self._parser.rollback(self._ahead)
        self._ahead, self._given_up_ahead = 0, self._given_up

    def write(self, tokens: Sequence[int]) -> None:
        """Commit tokens; they have been found legal.

        Raises:
            ValueError: they are not legal.
        """
        self.rewind()
        if (read := self.walk(tokens)) < len(tokens):
            raise ValueError(
                f"The grammar of a request does not go on with token {tokens[read]}, which stands "
                f"behind {read} others that were to be committed."
            )
        self._left -= self._ahead
        self._ahead, self._given_up = 0, self._given_up_ahead

    def is_over(self) -> bool:
        """Whether every token may stand where the look ahead came to."""
        over = self._ahead >= self._left or self._given_up_ahead
        return over or self._parser.is_terminated()

    def _reads(self, token: int) -> bool:
        # The parser reports every special token on stderr.
        if token in self._silent:
            return False
        if self._parser.accept_token(token):
            self._ahead += 1
            return True
        # What the parser refuses and the mask holds all the same.
        if token in self._ends and self.legal()[token]:
            self._given_up_ahead = True
        return self._given_up_ahead


@dataclass(slots=True)
class Outlook:
    """How far a canvas is legal."""

    legal: int  # rows from the first on, corrections in
    first: int  # the token of the first of them
    corrected: list[int] = field(default_factory=list)  # rows


def look_ahead(
    guards: Mapping[int, Guard],
    batch: CanvasBatch,
    stats: CanvasStats,
    ask: Callable[[Tensor, Sequence[Tensor]], CanvasStats],
) -> tuple[CanvasStats, dict[int, Outlook]]:
    """Read every guarded canvas and correct it.

    Args:
        guards: of the canvases that denoise, by their place in the batch.
        batch: of B canvases.
        stats: theirs, [B, L].
        ask: the head once more, given [N] int64 rows of the batch and a mask [V] bool for each.

    Returns:
        The statistics with those of the corrected rows in them; what became of each canvas.
    """
    length = stats.argmax.shape[1]
    argmax, width = stats.argmax.tolist(), batch.width.tolist()
    found = {}
    for canvas, guard in guards.items():
        guard.rewind()
        tokens = argmax[canvas][: width[canvas]]
        found[canvas] = Outlook(legal=guard.walk(tokens), first=tokens[0])
    for _ in range(CORRECTIONS):
        stuck = {canvas: each for canvas, each in found.items() if each.legal < width[canvas]}
        if not stuck:
            break
        rows = torch.tensor([canvas * length + each.legal for canvas, each in stuck.items()])
        rows = rows.to(stats.argmax.device)
        again = ask(rows, [guards[canvas].legal() for canvas in stuck])
        stats = stats.replaced(rows, again)
        for (canvas, each), token in zip(stuck.items(), again.argmax.tolist(), strict=True):
            each.first = each.first if each.legal else token
            each.corrected.append(each.legal)
            rest = argmax[canvas][each.legal + 1 : width[canvas]]
            each.legal += guards[canvas].walk([token, *rest])
    return stats, found


def obedient(
    guards: Mapping[int, Guard],
    found: Mapping[int, Outlook],
    batch: CanvasBatch,
    stats: CanvasStats,
    decision: Decision,
    *,
    out_of_steps: Tensor,
) -> Decision:
    """What becomes of guarded canvases: corrections held, nothing illegal settled or committed.

    Args:
        guards, batch: as for ``look_ahead``; a guard of a canvas that finishes has written it.
        found: what ``look_ahead`` found.
        stats: of the step, corrections in.
        decision: of the rule.
        out_of_steps: [B] bool, canvases that must end.
    """
    device, (num, length) = stats.argmax.device, stats.argmax.shape
    whole_rows = [found[each].legal if each in found else length for each in range(num)]
    whole = torch.tensor(whole_rows, device=device) >= batch.width
    corrected = [canvas * length + row for canvas, each in found.items() for row in each.corrected]
    held = torch.zeros_like(batch.valid)
    held.view(-1)[torch.tensor(corrected, dtype=torch.int64, device=device)] = True
    finished = decision.finished & (whole | out_of_steps)
    decision = replace(
        decision,
        accept=decision.accept | held,
        next_tokens=torch.where(held, stats.argmax, decision.next_tokens),
        finished=finished,
        reason=torch.where(whole, decision.reason, StopReason.STEPS),
    )
    ends = finished.tolist()
    commit = decision.commit or _whole(batch, stats.argmax)
    said, count, counts = commit.tokens.clone(), commit.count.clone(), commit.count.tolist()
    cut = False
    for canvas, guard in guards.items():
        if not ends[canvas]:
            continue
        tokens = said[canvas, : counts[canvas]].tolist()
        guard.rewind()
        legal = guard.walk(tokens)
        if not legal:  # A bad word was taken out where the grammar leaves no other.
            said[canvas, 0] = tokens[0] = found[canvas].first
            legal = 1
        cut |= legal < len(tokens)
        count[canvas] = legal
        guard.write(tokens[:legal])
    if cut:
        decision = replace(decision, commit=replace(commit, tokens=said, count=count))
    return decision


def under_mask(rewrite: Rewrite | None, rows: Tensor, masks: Sequence[Tensor]) -> Rewrite:
    """What is asked of some rows of a batch where a grammar says what may stand there.

    Args:
        rewrite: of the batch; None for nothing at all.
        rows: [N] int64, rows of the batch.
        masks: N times [V] bool, on the host. Of the ids that the request allows those that the
            grammar allows too are left, or, where none is, all that the grammar allows. No pin is
            left: one that is asked again was illegal.

    Returns:
        The rewrite of the N rows, each as a canvas of its own.
    """
    own = Rewrite(canvas=torch.arange(len(rows), device=rows.device))
    lists: list[list[int]] = [[]] * len(rows)
    if rewrite is not None and rewrite.allowed is not None:
        lists = rewrite.allowed[rewrite.canvas[rows]].tolist()
    own = replace(own, **_as_lists(masks, lists, rows.device))
    if rewrite is None:
        return own
    canvas = rewrite.canvas[rows]
    if rewrite.greedy is not None:
        own = replace(own, greedy=rewrite.greedy[canvas])
    if rewrite.bias is not None:
        ids, bias = rewrite.bias
        own = replace(own, bias=(ids[canvas], bias[canvas]))
    if (cost := rewrite.penalties) is not None:
        penalties = Penalties(
            ids=cost.ids[canvas], scale=cost.scale[canvas], offset=cost.offset[canvas]
        )
        own = replace(own, penalties=penalties)
    if rewrite.forbidden is not None:
        parts = [rewrite.forbidden[rows], *([] if own.forbidden is None else [own.forbidden])]
        own = replace(own, forbidden=torch.cat(parts, dim=1))
    if (asked := rewrite.truncation) is not None:
        truncation = replace(
            asked,
            min_p=asked.min_p[canvas],
            top_k=asked.top_k[canvas],
            top_p=asked.top_p[canvas],
        )
        own = replace(own, truncation=truncation)
    return own


def _as_lists(
    masks: Sequence[Tensor], lists: Sequence[Sequence[int]], device: torch.device
) -> dict[str, Tensor]:
    """``Rewrite.allowed`` and ``Rewrite.forbidden`` of rows: the shorter of the two for each.

    Args:
        masks: [V] bool for each row.
        lists: the ids that its request allows, -1 pads; of -1 alone, or empty, for all.
        device: where the batch runs.
    """
    allowed, forbidden = [], []
    for mask, mine in zip(masks, lists, strict=True):
        both = [token for token in mine if token >= 0 and mask[token]]
        few = 2 * int(mask.sum()) <= len(mask)
        legal = torch.tensor(both) if both else mask.nonzero()[:, 0]
        allowed.append(legal if both or few else legal[:0])
        forbidden.append(legal[:0] if both or few else (~mask).nonzero()[:, 0])
    parts = {"allowed": allowed, "forbidden": forbidden}
    return {
        name: torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-1).to(device)
        for name, part in parts.items()
        if any(len(each) for each in part)
    }


def _whole(batch: CanvasBatch, argmax: Tensor) -> Commit:
    rows = torch.arange(argmax.shape[1], device=argmax.device).expand_as(argmax)
    return Commit(tokens=argmax, rows=rows, count=batch.width)


class Guards:
    """The guards of the requests in their slots."""

    def __init__(self) -> None:
        self._of: dict[int, Guard] = {}

    def admit(self, slot: int, guard: Guard | None) -> None:
        """Give the slot to a request, which may have no guard."""
        self.release(slot)
        if guard is not None:
            self._of[slot] = guard

    def release(self, slot: int) -> None:
        """Finished, aborted or preempted."""
        self._of.pop(slot, None)

    def of(self, slots: Sequence[int]) -> dict[int, Guard]:
        """Those of the slots of a batch, by their place in it."""
        if self._of.keys().isdisjoint(slots):
            return {}
        return {place: self._of[slot] for place, slot in enumerate(slots) if slot in self._of}
