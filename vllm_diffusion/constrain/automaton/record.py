"""A compiled constraint, and the distribution of canvases under one.

No torch at run time: the processes that compile constraints load none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class TokenAutomaton:
    """Which token sequences a constraint accepts, over classes of tokens that no state tells apart.

    Host side, in numpy, can be pickled. N states, C classes, E edges, V tokens. Every state is
    live: from each, some sequence of tokens completes the text. Deterministic: a state has at most
    one edge by a class.

    The last state is the end: the text is over and its end token written. Every token leads from
    there back to it; these edges are not listed. Every accepting state has an edge to the end, by
    the class of the end tokens.
    """

    class_of: NDArray[np.int32]  # [V], class of every token id; 0: no state reads it
    num_classes: int  # C, class 0 counted
    source: NDArray[np.int32]  # [E], ascending
    symbol: NDArray[np.int32]  # [E], token class, 1..C-1, ascending inside a source
    target: NDArray[np.int32]  # [E]
    num_states: int  # N, the end counted
    start: int
    accepting: NDArray[np.bool_]  # [N], the text so far is complete; the end counts
    distance: NDArray[np.int32]  # [N], fewest tokens from a state to an accepting one
    depth: int | None = None  # how deep rules that embed themselves may nest; None: none does

    @property
    def end(self) -> int:
        """The state behind the end token."""
        return self.num_states - 1

    @property
    def nbytes(self) -> int:
        """Memory of the arrays, in bytes."""
        arrays = (
            self.class_of,
            self.source,
            self.symbol,
            self.target,
            self.accepting,
            self.distance,
        )
        return sum(array.nbytes for array in arrays)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """Canvases given that an automaton accepts them. B canvases, L rows, C classes.

    A row is free if nothing constrains it: rows behind the constrained ones, rows behind the end,
    and all rows of a canvas that cannot be accepted.
    """

    marginal: Tensor  # [B, L, C] fp32, probability that the row is not free and holds the class
    ended: Tensor  # [B, L] fp32, probability that the row is free; with the marginals it sums to 1
    sample_class: Tensor  # [B, L] int64, of one joint sample; -1 where it leaves the row free
    map_class: Tensor  # [B, L] int64, of the most likely canvas; -1 where it leaves the row free
    map_state: Tensor  # [B, L] int64, the state behind each row of it
    log_z: Tensor  # [B] fp64, log-probability that the canvas is accepted; -inf: it cannot be
