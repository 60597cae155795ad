"""CUDA graphs: the numbers of rows that forwards are captured for.

vLLM's own sizes end at 512 rows (1,024 on sm_100), which is two canvases. A step of n canvases and
nothing else, commits included, replays one FULL graph if a size of n canvases was captured. A step
with prompt rows, or with commit rows beside canvas rows, replays the pieces between its attention
layers at the next larger size; the rows in between are padding.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from vllm.config.compilation import CUDAGraphMode
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(f"vllm.{__name__}")

EXACT: Final = 32
"""Every number of canvases up to this has a graph. Larger numbers are spaced so that at most one
row in this many is padding."""

_PARTS_OF_ONE: Final = 8
_PARTS_OF_TWO: Final = 4


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
    below = {canvas * part // _PARTS_OF_ONE for part in range(1, _PARTS_OF_ONE)}
    below |= {canvas + canvas * part // _PARTS_OF_TWO for part in range(1, _PARTS_OF_TWO)}
    whole = {count * canvas for count in (*counted(seqs), seqs + 1)}
    return sorted(size for size in below | whole if 0 < size <= rows)


def counted(seqs: int) -> list[int]:
    """Numbers of canvases with a graph: all up to ``EXACT``, some above it, and ``seqs``."""
    counts, count = [], 0
    while (count := count + 1 + count // (EXACT + 1)) < seqs:
        counts.append(count)
    return [*counts, seqs]


def choose_capture_sizes(vllm_config: VllmConfig) -> None:
    """Make vLLM capture whole canvases, unless the user chose the sizes or capture is off.

    Call before vLLM makes its own choice, once ``max_num_seqs`` and the canvas width are final.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    if (
        current_platform.is_cpu()
        or vllm_config.model_config.enforce_eager
        or compilation.cudagraph_mode == CUDAGraphMode.NONE
    ):
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
    sizes = capture_sizes(
        canvas=canvas, seqs=scheduler.max_num_seqs, rows=scheduler.max_num_batched_tokens
    )
    compilation.cudagraph_capture_sizes = sizes
    logger.info(
        "CUDA graphs for %d numbers of rows, up to %d: %d are whole canvases, the rest are for "
        "steps with prompts. vLLM logs their memory once they are captured; to capture fewer, "
        "lower --max-num-seqs or set --cudagraph-capture-sizes.",
        len(sizes),
        sizes[-1],
        sum(size % canvas == 0 for size in sizes),
    )
