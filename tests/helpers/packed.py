"""Random packed matrices."""

from __future__ import annotations

import torch

from vllm_diffusion.quant.packed import GROUP, PackedMatrix


def random_packed(
    rows: int, inputs: int, *, form: str, experts: int | None = None, seed: int = 0
) -> PackedMatrix:
    """A matrix of weights near 1 / sqrt(inputs); a stack of them where `experts` is given.

    Every code of the form and many scales occur, NaN does not.
    """
    random = torch.Generator().manual_seed(seed)
    stack = () if experts is None else (experts,)

    def draw(*shape: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, (*stack, *shape), generator=random, dtype=torch.uint8)

    size = (torch.rand((*stack, rows), generator=random) + 0.5) / inputs**0.5
    if form == "nvfp4":
        # E4M3 numbers from 1/4 to 4, of either sign.
        scale = draw(rows, inputs // GROUP, low=40, high=72)
        sign = draw(rows, inputs // GROUP, high=2) << 7
        return PackedMatrix(
            codes=draw(rows, inputs // 2), group_scale=scale | sign, row_scale=size / 4
        )
    codes = draw(rows, inputs)
    codes[codes & 0x7F == 0x7F] = 0
    return PackedMatrix(codes=codes, group_scale=None, row_scale=size / 64)
