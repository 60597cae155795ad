"""The compiled form of a constraint: which token sequences it accepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


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
