"""Statistics of canvas rows by class of tokens, for canvases that an automaton constrains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_diffusion.records import TensorRecord

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassStats(TensorRecord):
    """Statistics of R rows by class of tokens, C classes; see ``Head.by_class``.

    Class 0 holds the tokens that nobody asks about; its column is that of an empty class.
    """

    log_mass: Tensor  # [R, C] fp32, log of the class's share of the row; -inf without a token
    entropy: Tensor  # [R, C] fp32, nats, of the distribution inside the class; 0 without a token
    best: Tensor  # [R, C] int64, its likeliest token, the lowest id among equals; -1 for none
    best_log_prob: Tensor  # [R, C] fp32, log of that token's share of the row; -inf for none
    second_log_prob: Tensor  # [R, C] fp32, of its next token; -inf for none
    sample: Tensor  # [R, C] int64, a token drawn inside the class; -1 for none
    sample_log_prob: Tensor | None = None
    """[R, C] fp32, log of that token's share of the row; None where no rule asks."""

    def permuted(self, index: Tensor) -> ClassStats:
        """These rows at the places ``index`` [R] int64, a permutation."""
        return self.map(lambda values: torch.empty_like(values).index_copy_(0, index, values))
