"""What one request asks of its canvases, on the host; ``table`` turns it into a ``Rewrite``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Holes:
    """The answer in a request whose single canvas is a text with holes (host side)."""

    shown: int  # rows the answer may take; those behind are context
    pad: int  # id that fills unused places of a hole; -1 for none
    end: int  # id that ends an answer which does not take all shown rows; -1 for none


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What one request changes in the distribution of its canvases (host side).

    The defaults change nothing. Positions are counted from the first token of the output.
    """

    temperature: float = 1.0  # factor of the schedule; 0: the kept token is the argmax
    min_p: float = 0.0
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    allowed: tuple[int, ...] = ()  # empty allows every id
    bias: tuple[tuple[int, float], ...] = ()  # (id, added to its logit)
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    early: tuple[tuple[int, int], ...] = ()  # (id, position before which it must not stand)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token ids of every word
    seed_canvas: tuple[int, ...] = ()  # first input of the canvas at these positions; -1 is noise
    pinned: tuple[int, ...] = ()  # positions that hold the seed canvas's token
    holes: Holes | None = None  # the pinned positions are a text with holes
    first_step: int | None = None  # the seed canvas is a draft: its canvases' first step
