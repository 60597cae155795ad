"""CUDA graphs: for which numbers of rows a forward is captured.

vLLM's own sizes end at 512 rows (1,024 on sm_100), which is two canvases. A step of n canvases and
nothing else, commits among them, replays one FULL graph if a size of n canvases was captured; a
step that holds prompt rows, or commit rows beside canvas rows, replays the pieces between its
attention layers at the next size above, and the rows in between are computed for nothing.
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
"""Up to so many canvases, every number of them has its graph; beyond, numbers are so far apart
that a step computes at most one row in this many for nothing."""

_PARTS_OF_ONE: Final = 8
_PARTS_OF_TWO: Final = 4


def capture_sizes(*, canvas: int, seqs: int, rows: int) -> list[int]:
    """Numbers of rows to capture, ascending, none above ``rows``.

    Below a canvas there are only steps of prompts, below two a canvas and a prompt: parts of one.
    (TRITON_ATTN keeps partial results for about as many sequences as the smallest size has rows:
    that should not be a whole canvas.) Behind ``seqs`` canvases one more, for what comes beside a
    full batch.

    Args:
        canvas: C, tokens.
        seqs: most canvases a step.
        rows: most rows a step.
    """
    below = {canvas * part // _PARTS_OF_ONE for part in range(1, _PARTS_OF_ONE)}
    below |= {canvas + canvas * part // _PARTS_OF_TWO for part in range(1, _PARTS_OF_TWO)}
    whole = {count * canvas for count in (*counted(seqs), seqs + 1)}
    return sorted(size for size in below | whole if 0 < size <= rows)


def counted(seqs: int) -> list[int]:
    """Numbers of canvases that have a graph: every one up to ``EXACT``, some beyond, ``seqs``."""
    counts, count = [], 0
    while (count := count + 1 + count // (EXACT + 1)) < seqs:
        counts.append(count)
    return [*counts, seqs]


def choose_capture_sizes(vllm_config: VllmConfig) -> None:
    """Ask vLLM for graphs of whole canvases, unless the user says what is captured, or nothing is.

    Call before vLLM makes its own choice, with ``max_num_seqs`` and the canvas settled.
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
            "CUDA graphs as asked for, up to %d rows: steps of more than %d canvases have none.",
            largest,
            largest // canvas,
        )
        return
    sizes = capture_sizes(
        canvas=canvas, seqs=scheduler.max_num_seqs, rows=scheduler.max_num_batched_tokens
    )
    compilation.cudagraph_capture_sizes = sizes
    logger.info(
        "CUDA graphs for %d numbers of rows, up to %d: %d numbers of canvases, the rest for steps "
        "that hold prompts. vLLM says what memory they took when they are captured; fewer are "
        "captured with a lower --max-num-seqs or with --cudagraph-capture-sizes.",
        len(sizes),
        sizes[-1],
        sum(size % canvas == 0 for size in sizes),
    )
