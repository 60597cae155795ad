"""The parser of a request whose grammar is too large for an automaton, and the parsers by slot.

A guard has read the committed text. It looks ahead along a canvas, says which tokens are legal
where it stopped, and moves on when tokens are committed. What follows for the canvas:
``corrections``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_diffusion.constrain.thought import Thought

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from xgrammar import GrammarMatcher

    from vllm_diffusion.constrain.automaton.thinking import Thinking


class Guard:
    """The parser of one request: it has read the committed text and looks ahead from there.

    Args:
        parser: has read nothing; see ``grammar.GrammarCompiler``.
        end_tokens: ids that end a text, those of the parser.
        silent: ids that write nothing, and are legal only behind the end.
        vocab_size: V.
        tokens_left: tokens the request may still write; None for any number.
        written: tokens it has already written, if it was preempted.
        thinking: comes before the text. It takes at most half of ``tokens_left``, so that some are
            left for the text: a parser does not know how long the shortest text is.
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
        self._ahead = 0  # tokens read beyond the committed ones
        # No token continued the text, so it was ended.
        self._given_up = self._given_up_ahead = False
        if written:
            self.write(written)

    def walk(self, tokens: Sequence[int]) -> int:
        """Look ahead along some tokens; returns how many of them, from the first, are legal.

        Continues where the last look ahead stopped. Behind the end of the text, and beyond what the
        request may write, every token is legal.
        """
        for place, token in enumerate(tokens):
            if self.is_over():
                break
            if not self._reads(token):
                return place
        return len(tokens)

    def legal(self) -> Tensor:
        """[V] bool: the ids that are legal where the look ahead stopped, at least one.

        If no token of the vocabulary continues the grammar there, the text ends.
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
        """Return to the committed text."""
        read = self._ahead - (self._thought.ahead if self._thought is not None else 0)
        if read:
            self._parser.rollback(read)
        if self._thought is not None:
            self._thought.rewind()
        self._ahead, self._given_up_ahead = 0, self._given_up

    def write(self, tokens: Sequence[int]) -> None:
        """Commit tokens that are legal.

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
        """Whether every token is legal where the look ahead stopped."""
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
        # The parser refuses it, but the mask allows it.
        if token in self._ends and self.legal()[token]:
            self._given_up_ahead = True
        return self._given_up_ahead


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
        """The guards of the slots of a batch, by their place in it."""
        if self._of.keys().isdisjoint(slots):
            return {}
        return {place: self._of[slot] for place, slot in enumerate(slots) if slot in self._of}
