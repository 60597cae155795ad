"""Check in the worker that the scheduler granted each canvas the rows that ``grid`` says it has.

A mismatch would otherwise only show as wrong text. The check needs no device sync under synchronous
scheduling with our own scheduler, and is made only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_diffusion import grid

if TYPE_CHECKING:
    from vllm_diffusion.family import Family


class Account:
    """Knows the width that the canvas of every slot must have.

    Args:
        family: the model's family.
        slots: S.
        width: canvas width of requests that set none.
        end: ``max_model_len``.
    """

    def __init__(self, family: Family, *, slots: int, width: int, end: int) -> None:
        self._family, self._end, self._width = family, end, width
        self._asked = [(width, end)] * slots

    def admit(self, slot: int, asked: int | None, *, answer_end: int) -> None:
        """Set what the slot's new owner asks for.

        Args:
            slot: index of the slot.
            asked: canvas width; None for the default.
            answer_end: prompt and most tokens of the answer.
        """
        self._asked[slot] = asked or self._width, answer_end

    def check(self, batch: Any, widths: np.ndarray) -> None:
        """Compare the rows scheduled for a step with the expected ones.

        Args:
            batch: the runner's ``InputBatch``.
            widths: [N], rows of every request's canvas and horizon, 0 for none.

        Raises:
            AssertionError: scheduler and worker disagree.
        """
        for row in np.flatnonzero(widths).tolist():
            width, slot = int(widths[row]), int(batch.idx_mapping_np[row])
            behind = int(batch.num_computed_tokens_np[row] + batch.num_scheduled_tokens[row])
            asked, answer_end = self._asked[slot]
            _, expected = grid.drafted_rows(
                self._family,
                known=behind - width,
                asked=asked,
                end=self._end,
                answer_end=answer_end,
            )
            assert width == expected, (
                f"the scheduler gave {batch.req_ids[row]} a canvas of {width} rows at "
                f"{behind - width}, the worker expects {expected}"
            )
