"""How wide a canvas is, and how many positions of a request count as computed after a step.

Scheduler and worker each keep account of a request; text comes out wrong, without an error, as soon
as the two disagree. So both ask here.

    known    tokens of the request before its canvas: prompt and answer so far
    upto     positions up to the last row of a step

    text                  after a step of the canvas     after its commit, if that is a step
    causal                known                          known + what was committed
    block                 the last grid point <= known   the same of known + what was committed
    whole                 0; all text, if approximate    0

Counts are integers in the scheduler, and tensors of them, [N], in the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.family import Family

    Count = TypeVar("Count", int, Tensor)


def canvas_width(family: Family, *, known: int, asked: int, end: int) -> int:
    """Positions of the canvas that begins behind the known tokens.

    Args:
        family: of the model.
        known: tokens before the canvas.
        asked: the width that the request, or the engine, names; a grid has its own.
        end: no position may stand there or behind: the engine's limit.
    """
    if family.text is Text.BLOCK:
        asked = _block(family) - known % _block(family)
    return min(asked, end - known)


def drafted_rows(
    family: Family, *, known: int, asked: int, end: int, answer_end: int
) -> tuple[int, int]:
    """Rows behind the known tokens: of the canvas, and of the canvas and its horizon.

    Args:
        family, known, asked, end: as for ``canvas_width``.
        answer_end: prompt and most tokens of the answer; a horizon ends there.
    """
    end = min(end, answer_end) if family.horizon else end
    width = canvas_width(family, known=known, asked=asked, end=end)
    return width, width + horizon_rows(family, known=known, width=width, answer_end=end)


def text_rows(family: Family, *, known: int, computed: int) -> int:
    """Rows of known text that run in front of a canvas, in every one of its steps or beside one.

    Causal text runs once, beside the first step of the canvas behind it. On a grid the text that
    shares a block with the canvas runs with each step, without a grid and without causality all of
    the text does.

    Args:
        family: of the model.
        known: tokens before the canvas.
        computed: of these, those that count as computed.
    """
    del family  # ``kept`` makes the difference
    return known - computed


def horizon_rows(family: Family, *, known: int, width: int, answer_end: int) -> int:
    """Rows of noise behind a canvas of this width, up to the end of the answer that is asked for.

    Args:
        family: of the model.
        known: tokens before the canvas.
        width: of the canvas.
        answer_end: prompt and most tokens of the answer.
    """
    return max(0, answer_end - known - width) if family.horizon else 0


def kept_of_text(family: Family, *, upto: Count, known: Count) -> Count:
    """Positions that count as computed after a step that ran nothing but known text.

    Args:
        family: of the model.
        upto: positions up to the last row of the step.
        known: all of the text; a chunk of it ends earlier.
    """
    if family.text is Text.WHOLE:
        return upto * (upto < known)
    return _grid_point(family, upto)


def kept_of_canvas(family: Family, *, known: Count, reused: Count | bool = False) -> Count:
    """Positions that count as computed after a step of a canvas, also after its last one.

    What is committed by a step of its own counts on top of that, see ``kept_of_commit``.

    Args:
        family: of the model.
        known: tokens before the canvas.
        reused: where all text is computed in every step: whether the next one takes it as it is, an
            approximation that a request may ask for while its canvas goes on.
    """
    return known * reused if family.text is Text.WHOLE else _grid_point(family, known)


def kept_of_commit(family: Family, *, known: Count, count: Count) -> Count:
    """Positions that count as computed after a step that only committed ``count`` tokens."""
    return known * 0 if family.text is Text.WHOLE else _grid_point(family, known + count)


def _grid_point(family: Family, position: Count) -> Count:
    """The last point of the grid at or before a position; the position where there is no grid."""
    return position - position % _block(family) if family.text is Text.BLOCK else position


def _block(family: Family) -> int:
    assert family.block is not None, f"{family.name} has a grid and no block"
    return family.block
