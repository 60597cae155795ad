"""Counter-based noise: a number depends only on (seed, position, step, purpose, tile).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The counter
is ``(position, step, purpose, tile)``, the key is the request's 64-bit seed. Because no state is
carried from draw to draw, a request sees the same noise alone, in any batch, after preemption and
under chunked prefill. The layout below is part of the definition: every implementation (torch here,
kernels elsewhere) must agree on it bit for bit.
"""

from __future__ import annotations

from enum import IntEnum
from functools import cache
from hashlib import blake2b
from typing import Final

import torch
from torch import Tensor

_MASK32: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10
_MURMUR: Final = (0x85EBCA6B, 0xC2B2AE35)

# n + 0.5 with 23 bits is the most that fp32 represents exactly below 1. With 24 bits it rounds to
# even above one half, and the largest word becomes 1.0, whose Gumbel is infinite.
_UNIFORM_BITS: Final = 23


class Purpose(IntEnum):
    """What a number is drawn for. No two purposes share a counter."""

    INITIAL_CANVAS = 0
    SAMPLE = 1
    RENOISE = 2
    DRAFT = 3
    CLASS = 4
    PATH = 5
    REVEAL = 6


def request_seed(seed: int | None, request_id: str) -> int:
    """The 64-bit key of a request's noise.

    A client's ``seed`` is taken modulo 2**64. Without one the key is a hash of the request id,
    which is unique, survives preemption, and is known to every tensor-parallel rank.
    """
    if seed is not None:
        return seed % (1 << 64)
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest(), "little")


def split_seed(seed: int) -> tuple[int, int]:
    """(low, high) 32-bit words of a 64-bit seed: the Philox key."""
    return seed & _MASK32, (seed >> 32) & _MASK32


def philox(
    seed: Tensor, position: Tensor, step: Tensor, purpose: Purpose, tile: Tensor | int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter.

    Args:
        seed: [..., 2] int64, low and high word of the request seed, each in [0, 2**32).
        position: [...] int64, absolute position in the sequence.
        step: [...] int64, denoising step, counted from 0 within a canvas.
        purpose: what the number is for.
        tile: [...] int64 or int, which vocabulary tile (0 where tiles do not matter).

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    # The generator treats c0 and c2 alike, and c1 and c3. Each pair is stacked in one tensor, which
    # halves the number of operations. Adding zero broadcasts.
    zero = (position + step + seed[..., 0] + tile) * 0
    even = torch.stack([zero + position, zero + int(purpose)])
    odd = torch.stack([zero + step, zero + tile])
    column = (2, *[1] * zero.dim())
    multiplier, weyl = (each.view(column) for each in _constants(zero.device))
    key = torch.stack([zero + seed[..., 0], zero + seed[..., 1]])
    for _ in range(_ROUNDS):
        # int64 multiplication wraps modulo 2**64, so bits 32..63 of the product survive the
        # arithmetic shift; masking removes the sign extension.
        product = (even * multiplier).flip(0)
        even = ((product >> 32) & _MASK32) ^ odd ^ key
        odd = product & _MASK32
        key = (key + weyl) & _MASK32
    return even[0], odd[0], even[1], odd[1]


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Multipliers and key increments, [2] int64 each; cached, as creating them syncs with a GPU."""
    return torch.tensor(_MULTIPLIERS, device=device), torch.tensor(_WEYL, device=device)


def uniform(word: Tensor) -> Tensor:
    """fp32 in the open interval (0, 1) from a 32-bit word: the top 23 bits, centred; exact."""
    return ((word >> (32 - _UNIFORM_BITS)).to(torch.float32) + 0.5) * 2.0**-_UNIFORM_BITS


def token_words(key: tuple[Tensor, Tensor], token: Tensor) -> Tensor:
    """A 32-bit word per token id, cheaper than a Philox call per id.

    The finaliser of MurmurHash3 (Appleby, public domain) over id and key. One word of the key goes
    in before its first product and the other after it, so that no two keys give the same words in
    another order.

    Args:
        key: two words of [...] int64 in [0, 2**32), from ``philox``.
        token: [...] int64 ids.

    Returns:
        int64 of the broadcast shape, in [0, 2**32).
    """
    word = (token + key[0]) & _MASK32
    word = ((word ^ (word >> 16)) * _MURMUR[0] & _MASK32) ^ key[1]
    word = (word ^ (word >> 13)) * _MURMUR[1] & _MASK32
    return word ^ (word >> 16)


def fine_uniform(word: Tensor) -> Tensor:
    """fp32 in the open interval (0, 1) from a 32-bit word, keeping all of its bits near 0.

    For minima over many numbers: among 2**18 numbers of 23 bits the least is often tied.
    """
    return ((word.to(torch.float32) + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24)


def random_tokens(
    seed: Tensor, position: Tensor, step: Tensor, purpose: Purpose, vocab_size: int
) -> Tensor:
    """Uniform token ids, int64, of the broadcast shape of ``position`` and ``step``.

    Multiply-shift of one 32-bit word; the bias is below vocab_size / 2**32 (6e-5 at 262144).
    """
    word = philox(seed, position, step, purpose)[0]
    return (word * vocab_size) >> 32
