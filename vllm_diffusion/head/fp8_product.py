"""Logits of chunks from the fp8 copy of the output matrix, exact for the best ids: for GPUs.

``round_row`` rounds the states to fp8 once; a product of fp8 gives the logits of a chunk, and
``rescore_row`` replaces those of its best ids by the matrix's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
from torch.nn.functional import ScalingType, scaled_mm

from vllm_diffusion.head import sample
from vllm_diffusion.head.fp8_kernels import rescore_row, round_row

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.head.output_copy import QuantisedOutput
    from vllm_diffusion.head.vocabulary import Vocabulary

_PIECE: Final = 256
"""Inputs of an id that a program has at once while it scores ids exactly."""


class Fp8Product:
    """Products with the fp8 copy, in bf16; exact for the best ids of every row in every chunk.

    The best ids of the vocabulary are among the best of the chunks.
    """

    def __init__(
        self, vocabulary: Vocabulary, copy: QuantisedOutput, hidden: Tensor, ids: int
    ) -> None:
        (rows, inputs), count = hidden.shape, copy.rescored
        self._vocabulary, self._hidden = vocabulary, hidden
        self._weights, self._scales = copy.fp8()
        self._codes = hidden.new_empty(rows, inputs, dtype=torch.float8_e4m3fn)
        self._scale = hidden.new_empty(rows, 1, dtype=torch.float32)
        self._places = hidden.new_empty(rows, count, dtype=torch.int32)
        self._tiles = triton.next_power_of_2(-(-ids // sample.TILE))
        round_row[(rows,)](
            hidden,
            hidden.stride(0),
            inputs,
            self._codes,
            self._scale,
            BLOCK=triton.next_power_of_2(inputs),
            num_warps=8,
        )

    def __call__(self, some: slice) -> Tensor:
        """Logits [R, n] of some ids."""
        logits = scaled_mm(
            self._codes,
            self._weights[some].T,
            self._scale,
            ScalingType.RowWise,
            self._scales[some][None],
            ScalingType.RowWise,
            output_dtype=torch.bfloat16,
            # Sums that a tensor core keeps in fewer bits than fp32 still have more than the codes.
            use_fast_accum=True,
        )
        rows, width = logits.shape
        output, block = self._vocabulary.output[some], self._vocabulary.block()
        rescore_row[(rows,)](
            logits,
            width,
            self._hidden,
            self._hidden.stride(0),
            output,
            output.stride(0),
            output.shape[1],
            self._places,
            COUNT=self._places.shape[1],
            BITS=16,
            TILES=self._tiles,
            WHOLE=width % sample.TILE == 0 and block == sample.TILE,
            TILE=sample.TILE,
            BLOCK=block,
            PIECE=_PIECE,
            num_warps=8,
        )
        return logits
