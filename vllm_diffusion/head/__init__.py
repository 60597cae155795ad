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

        One pass over the vocabulary serves both, except for rows whose rewrite forbids ids. Of
        these the statistics by class are those of another distribution, in which such an id costs
        ``constrain.logits.LENIENCE`` nats; pins stay hard. A greedy canvas's sample in a class is
        the best token of the class.

        Args:
            rows: as for ``__call__``.
            class_of: [V] int32, in [0, num_classes); 0 for tokens that nobody asks about. Give the
                same tensor, unchanged, in every step: what is prepared for it is kept with it.
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
        """What softmax(softcap(hidden @ E^T)) says of chosen tokens: temperature 1, no rewrite.

        Args:
            hidden: [R, H] model dtype.
            tokens: [R] int64, the chosen ones.
            count: the most likely ids that come beside each, -1 for the whole vocabulary.
            ids: these ids instead, the same for every row.
            among: of the distribution over ``ids`` alone; a rank counts them alone.
            raw_logits: logits instead of log-probabilities.
        """
        ...
