"""CUDA graphs: the numbers of rows that forwards are captured for.

vLLM's own sizes end at 512 rows (1,024 on sm_100), which is two canvases of 256. A step of n
canvases and nothing else, commits included, replays one FULL graph if a size of n canvases was
captured. A step with prompt rows, or with commit rows beside canvas rows, replays the pieces
between its attention layers at the next larger size; the rows in between are padding.

Where text is on a grid, a canvas is a block of it and the same holds, with one more kind of step in
pieces: one in which a prompt's last rows still run in front of its first canvas, which vLLM takes
for a prompt's. Where all text runs in every step, every step is one of prompts: there is no FULL
graph, and vLLM's sizes are kept.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform

from vllm_diffusion.engine import carriers
from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

EXACT: Final = 32
"""Every number of canvases up to this has a graph. Larger numbers are spaced so that at most one
row in this many is padding."""

LEAST_GAP: Final = 8
"""Rows from one size to the next, or a canvas if it is wider: so few rows of padding cost a forward
nothing. Up to 512 rows these are about vLLM's own sizes."""

MOST_ROWS: Final = 1024
"""Of a graph where canvases are blocks of a grid: vLLM's own limit. A forward of more rows takes
longer than its launches."""

_PARTS_OF_ONE: Final = 8
_PARTS_OF_THE_SECOND: Final = 4


def capture_sizes(*, canvas: int, seqs: int, rows: int) -> list[int]:
    """Numbers of rows to capture, ascending, none above ``rows``.

    Steps of fewer rows than a canvas are prompts only, and below two canvases there is one canvas
    and prompt rows; these sizes are fractions of a canvas. (TRITON_ATTN keeps partial results for
    about as many sequences as the smallest size has rows, which should be less than a canvas.) The
    largest size is one canvas more than ``seqs``, for rows beside a full batch.

    Args:
        canvas: C, tokens.
        seqs: most canvases per step.
        rows: most rows per step.
    """
    first, second = (
        min(parts, max(1, canvas // LEAST_GAP)) for parts in (_PARTS_OF_ONE, _PARTS_OF_THE_SECOND)
    )
    below = {canvas * part // first for part in range(1, first)}
    below |= {canvas + canvas * part // second for part in range(1, second)}
    counts = counted(seqs, max(1, LEAST_GAP // canvas))
    whole = {count * canvas for count in (*counts, seqs + 1)}
    return sorted(size for size in below | whole if 0 < size <= rows)


def counted(seqs: int, gap: int = 1) -> list[int]:
    """Numbers of canvases with a graph, ascending.

    1, multiples of ``gap`` that are spaced wider above ``EXACT``, and ``seqs``.
    """
    counts, count = {1, seqs}, gap
    while count < seqs:
        counts.add(count)
        count += gap * -(-(1 + count // (EXACT + 1)) // gap)
    return sorted(counts)


def choose_capture_sizes(vllm_config: VllmConfig) -> None:
    """Make vLLM capture whole canvases, unless the user chose the sizes or capture is off.

    Where all text runs in every step, its own choice is kept, without FULL graphs. Call before
    vLLM makes it, once the family, ``max_num_seqs`` and the canvas width are final.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    if (
        current_platform.is_cpu()
        or vllm_config.model_config.enforce_eager
        or compilation.cudagraph_mode == CUDAGraphMode.NONE
    ):
        return
    text = carriers.served(vllm_config.model_config.hf_config).family.text
    if text is Text.WHOLE:
        if compilation.cudagraph_mode in {None, CUDAGraphMode.FULL_AND_PIECEWISE}:
            compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
        return
    canvas = vllm_config.diffusion_config.canvas_length
    asked = compilation.cudagraph_capture_sizes or compilation.max_cudagraph_capture_size
    if asked is not None:
        largest = max(asked) if isinstance(asked, list) else asked
        logger.info(
            "CUDA graphs as requested, up to %d rows: steps of more than %d canvases have none.",
            largest,
            largest // canvas,
        )
        return
    rows = scheduler.max_num_batched_tokens
    rows = min(rows, MOST_ROWS) if text is Text.BLOCK else rows
    sizes = capture_sizes(canvas=canvas, seqs=scheduler.max_num_seqs, rows=rows)
    compilation.cudagraph_capture_sizes = sizes
    logger.info(
        "CUDA graphs for %d numbers of rows, up to %d: %d are whole canvases, the rest are for "
        "steps with prompts. vLLM logs their memory once they are captured; to capture fewer, "
        "lower --max-num-seqs or set --cudagraph-capture-sizes.",
        len(sizes),
        sizes[-1],
        sum(size % canvas == 0 for size in sizes),
    )
