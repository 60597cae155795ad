"""A canvas that obeys a grammar which no automaton of a fair size can hold: a parser guards it.

A parser reads from left to right and a canvas settles anywhere, so a parser cannot condition all of
its rows at once as ``constrain.automaton`` does. It can say how far a canvas is legal:

1. Every step, the argmax of a guarded canvas is read from the committed text on. The first row
   that may not stand there is asked again under the mask of what may: all of its statistics become
   those of the masked distribution, and its new argmax is the next input of the row. The rows
   behind it were guessed beside another token. They are left to the ordinary rule, and see the
   correction in the next step.
2. A canvas whose argmax is legal as it is settles by the ordinary rule, and is committed whole.
3. One that needs a correction ends where the rule would settle it and the correction has changed
   nothing since the step before; or at the step limit. It commits its rows up to the corrected one,
   which is at least one. The rest is denoised again, as part of the next canvas, behind a text that
   the model cannot overlook any more.

So whatever is committed is the beginning of a text that the grammar allows, and behind a complete
one stands an end token. What follows the end is free, as are rows that the request's budget does
not reach. A budget may run out before the text is complete: then it is a beginning, no more. A
constraint wins over every other wish, so bad words and pins hold only where the grammar leaves a
choice.

The parser is on the host: a batch with guarded canvases waits for the device twice in every step,
before the corrections and behind the decision.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_diffusion.constrain.crossing import on_device, sent
from vllm_diffusion.constrain.thought import Thought
from vllm_diffusion.records import Penalties, Rewrite, StopReason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from xgrammar import GrammarMatcher

    from vllm_diffusion.constrain.automaton.thinking import Thinking
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision


class Guard:
    """The parser of one request: it stands behind the committed text and looks ahead from there.

    Args:
        parser: has read nothing; see ``grammar.GrammarCompiler``.
        end_tokens: ids that end a text, those of the parser.
        silent: ids that write nothing and so stand nowhere but behind the end.
        vocab_size: ids there are.
        tokens_left: that the request may write; None for any number.
        written: the tokens it has written before, for one that comes back.
        thinking: that comes before the text. It takes half of ``tokens_left`` at most, so that some
            are left for the text, whose shortest form a parser does not know.
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
        thinking: Thinking | None = None,
    ) -> None:
        self._parser = parser
        self._ends = frozenset(end_tokens)
        self._silent = silent - self._ends
        self._left = sys.maxsize if tokens_left is None else tokens_left + len(written)
        self._thought: Thought | None = None
        if thinking is not None:
            most = None if tokens_left is None else self._left // 2
            self._thought = Thought(thinking, end_tokens=end_tokens, most=most)
        self._words = torch.empty(1, -(-vocab_size // 32), dtype=torch.int32)
        self._vocab_size = vocab_size
        self._ahead = 0  # tokens that have been read beyond the committed ones
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
        if self._thought is not None and not self._thought.over:
            return self._thought.legal(self._vocab_size)
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
        read = self._ahead - (self._thought.ahead if self._thought is not None else 0)
        if read:
            self._parser.rollback(read)
        if self._thought is not None:
            self._thought.rewind()
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
        if self._thought is not None:
            self._thought.write()
        self._left -= self._ahead
        self._ahead, self._given_up = 0, self._given_up_ahead

    def is_over(self) -> bool:
        """Whether every token may stand where the look ahead came to."""
        over = self._ahead >= self._left or self._given_up_ahead
        return over or self._parser.is_terminated()

    def _reads(self, token: int) -> bool:
        if self._thought is not None and not self._thought.over:
            read = self._thought.reads(token)
            self._ahead += read
            return read
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
        stats: theirs, [B, L].
        ask: the head once more, given [N] int64 rows of the batch and a mask [V] bool for each.
        causal: [B] bool, canvases that are being committed: what these hold has been written.

    Returns:
        The guards of the canvases that denoise; the statistics with those of the corrected rows in
        them; the row by canvas.
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
    # Logits that are no numbers have no best token, and end no canvas: any legal one does.
    legal = sent(torch.stack(masks), device).gather(1, again.argmax[:, None])[:, 0]
    any_legal = on_device([int(mask.int().argmax()) for mask in masks], device)
    again = replace(again, argmax=torch.where(legal, again.argmax, any_legal))
    return denoising, stats.replaced(rows, again), corrected


def enforced(
    guards: Mapping[int, Guard],
    corrected: Mapping[int, int],
    batch: CanvasBatch,
    stats: CanvasStats,
    decision: Decision,
    *,
    rests: Tensor,
    out_of_steps: Tensor,
) -> Decision:
    """What becomes of guarded canvases: corrections held, nothing illegal settled or committed.

    Args:
        guards, batch: as for ``look_ahead``; a guard of a canvas that finishes has written it.
        corrected: the rows that ``look_ahead`` has corrected.
        stats: of the step, corrections in.
        decision: of the rule.
        rests: [B] bool, the argmax is that of the step before, corrections in.
        out_of_steps: [B] bool, canvases that must end.
    """
    held = torch.zeros_like(batch.valid)
    for canvas, row in corrected.items():
        held[canvas, row] = True
    may_end = ~held.any(dim=1) | rests
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
        *said, asked, finishes = read[canvas]
        if not finishes:
            continue
        guard.rewind()
        end = min(asked, corrected.get(canvas, asked) + 1)
        legal = guard.walk(said[:end])
        if not legal:
            # A bad word was taken out of the first row, and the grammar leaves nothing else there.
            best = int(guard.legal().int().argmax())
            said[0] = tokens[canvas, 0] = best
            legal = 1
            changed = True
        changed |= legal < asked
        count[canvas] = legal
        guard.write(said[:legal])
    if changed:
        decision = replace(decision, commit=replace(commit, tokens=tokens, count=count))
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
    lists: list[list[int]] = [[]] * len(rows)
    if rewrite is not None and rewrite.allowed is not None:
        lists = rewrite.allowed[rewrite.canvas[rows]].tolist()
    allowed, forbidden = _as_lists(masks, lists)
    own = Rewrite(
        canvas=torch.arange(len(rows), device=rows.device),
        allowed=_padded(allowed, rows.device),
        forbidden=_padded(forbidden, rows.device),
    )
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
    masks: Sequence[Tensor], lists: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The ids that rows may say, or those that they may not: the shorter list, the other empty.

    Args:
        masks: [V] bool for each row.
        lists: the ids that its request allows, -1 pads; of -1 alone, or empty, for all.
    """
    allowed, forbidden = [], []
    for mask, mine in zip(masks, lists, strict=True):
        both = [token for token in mine if token >= 0 and mask[token]]
        few = bool(both) or 2 * int(mask.sum()) <= len(mask)
        legal = torch.tensor(both) if both else mask.nonzero()[:, 0]
        allowed.append(legal if few else legal[:0])
        forbidden.append(legal[:0] if few else (~mask).nonzero()[:, 0])
    return allowed, forbidden


def _padded(lists: Sequence[Tensor], device: torch.device) -> Tensor | None:
    """[N, M] int64, -1 pads; None where all lists are empty."""
    if not any(len(each) for each in lists):
        return None
    padded = torch.nn.utils.rnn.pad_sequence([*lists], batch_first=True, padding_value=-1)
    return sent(padded, device)


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
