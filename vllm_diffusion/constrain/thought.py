"""Thinking before a text that a parser follows, read from left to right like the text.

Takes tokens as they are read ahead and committed. Says which tokens are legal, and when thinking is
over and the parser continues. An automaton has this in its states, see ``automaton.thinking``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from vllm_diffusion.constrain.automaton.thinking import Thinking


class Thought:
    """The thinking of one request.

    Args:
        thinking: how it begins and ends.
        end_tokens: ids that end a text, and cannot stand in the thinking.
        most: tokens it may take, both ends counted; None for any number.
    """

    def __init__(
        self, thinking: Thinking, *, end_tokens: Iterable[int], most: int | None = None
    ) -> None:
        self._thinking = thinking
        self._forbidden = frozenset((*end_tokens, *thinking.forbidden))
        self._most = sys.maxsize if most is None else max(most, thinking.tokens)
        self._read = self._written = 0
        self._over = self._over_written = False

    @property
    def over(self) -> bool:
        """Whether thinking has ended where the look ahead stopped."""
        return self._over

    @property
    def ahead(self) -> int:
        """Tokens of it that were read ahead and are not committed."""
        return self._read - self._written

    def reads(self, token: int) -> bool:
        """Whether a token is legal here; if so, it is read."""
        only = self._only()
        if token != only if only is not None else token in self._forbidden:
            return False
        opens = self._read == 0 and self._thinking.begin is not None
        self._over = token == self._thinking.until and not opens
        self._read += 1
        return True

    def legal(self, vocab_size: int) -> Tensor:
        """[V] bool: the legal ids."""
        only = self._only()
        mask = torch.full((vocab_size,), only is None)
        mask[list(self._forbidden) if only is None else [only]] = only is not None
        return mask

    def rewind(self) -> None:
        """Return to the committed tokens."""
        self._read, self._over = self._written, self._over_written

    def write(self) -> None:
        """Commit what was read ahead."""
        self._written, self._over_written = self._read, self._over

    def _only(self) -> int | None:
        """The only legal token; None where most are legal."""
        if self._read == 0 and self._thinking.begin is not None:
            return self._thinking.begin
        return self._thinking.until if self._read >= self._most - 1 else None
