"""The worker's side of the account that ``grid`` keeps: it asserts that the scheduler agrees.

A disagreement would not be an error anywhere, only wrong text. Known on the host where scheduling
is synchronous and the scheduler is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_diffusion import grid

if TYPE_CHECKING:
    from vllm_diffusion.family import Family


class Account:
    """What width the canvas of every slot has to have.

    Args:
        family: of the model.
        slots: S.
        width: of a canvas whose request names none.
        end: ``max_model_len``.
    """

    def __init__(self, family: Family, *, slots: int, width: int, end: int) -> None:
        self._family, self._end, self._width = family, end, width
        self._asked = [width] * slots

    def admit(self, slot: int, asked: int | None) -> None:
        """Note the width that the slot's new owner asks for; None for none."""
        self._asked[slot] = asked or self._width

    def check(self, batch: Any, widths: np.ndarray) -> None:
        """Compare the rows that a step was scheduled for with what they have to be.

        Args:
            batch: the runner's ``InputBatch``.
            widths: [N], rows of every request's canvas, 0 for none.

        Raises:
            AssertionError: scheduler and worker disagree.
        """
        for row in np.flatnonzero(widths).tolist():
            width, slot = int(widths[row]), int(batch.idx_mapping_np[row])
            behind = int(batch.num_computed_tokens_np[row] + batch.num_scheduled_tokens[row])
            expected = grid.canvas_width(
                self._family, known=behind - width, asked=self._asked[slot], end=self._end
            )
            assert width == expected, (
                f"the scheduler gave {batch.req_ids[row]} a canvas of {width} rows at "
                f"{behind - width}, the worker expects {expected}"
            )
