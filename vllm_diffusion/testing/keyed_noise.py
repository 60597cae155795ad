"""Random tensors that depend on a key alone, whatever was drawn before."""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_noise(key: str, *shapes: Sequence[int]) -> "list[torch.Tensor]":
    """Standard normal fp32 tensors of these shapes, one after the other from one generator."""
    import torch

    # torch's CPU generator keeps the low 32 bits of its seed, so the whole key is hashed.
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return [torch.randn(tuple(shape), generator=generator) for shape in shapes]
