"""Hidden rows -> CanvasStats. ``Head`` is the interface, ``reference`` the readable truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.constrain.automaton.class_stats import ClassStats
    from vllm_diffusion.head.rows import Rows
    from vllm_diffusion.records import CanvasStats, TokenScores


class Head(Protocol):
    """Turns the final hidden states of R canvas rows into their statistics."""

    def __call__(self, rows: Rows) -> CanvasStats:
        """Statistics of softmax(rewritten(softcap(hidden @ E^T)) / temperature), [R].

        Args:
            rows: hidden states, temperature and everything else that a row is read with.
        """
        ...

    def by_class(
        self, rows: Rows, *, class_of: Tensor, num_classes: int
    ) -> tuple[CanvasStats, ClassStats]:
        """What ``__call__`` gives, and the same distribution by class of tokens.

        One pass over the vocabulary serves both, except for rows whose rewrite forbids ids. Their
        statistics by class come from another distribution, in which a forbidden id costs
        ``constrain.logits.LENIENCE`` nats instead; pins stay hard. Where a canvas is greedy, the
        sample in a class is the best token of the class.

        Args:
            rows: as for ``__call__``.
            class_of: [V] int32, in [0, num_classes); 0 for tokens that nobody asks about. Pass the
                same tensor, unchanged, in every step: what is prepared for it is cached by it.
            num_classes: C, class 0 counted. [R, C] numbers exist, whatever the memory budget.
        """
        ...

    def candidates(self, rows: Rows, count: int) -> Tensor:
        """The best ids of every row after the rewrite, truncation left out.

        Args:
            rows: only their hidden states and rewrite are read.
            count: ids a row.

        Returns:
            [R, min(count, vocab)] int64, best first, -1 where fewer ids may stand there.
        """
        ...

    def scores(
        self,
        hidden: Tensor,
        tokens: Tensor,
        *,
        count: int,
        ids: tuple[int, ...] | None = None,
        among: bool = False,
        raw_logits: bool = False,
    ) -> TokenScores:
        """Scores of chosen tokens under softmax(softcap(hidden @ E^T)): temperature 1, no rewrite.

        Args:
            hidden: [R, H] model dtype.
            tokens: [R] int64, the chosen ones.
            count: how many of the most likely ids to score as well, -1 for the whole vocabulary.
            ids: score these ids instead, the same for every row.
            among: normalise over ``ids`` alone, and count only them in a rank.
            raw_logits: logits instead of log-probabilities.
        """
        ...
