"""``rng`` for Triton kernels: the same numbers, bit for bit.

Imported only by Triton kernels. The generator is Triton's own Philox; this module has the layout of
key and counter, and the conversion of words to uniforms and token ids.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A purpose is an argument of type constexpr: pass ``int(Purpose.X)``.


@triton.jit
def seed_of(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Key of a request's noise, from its two words [...] int64, in the form ``words`` takes."""
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def words(
    seed: tl.tensor,
    position: tl.tensor,
    step: tl.tensor,
    purpose: tl.constexpr,
    tile: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four uint32 words per counter, see ``rng.philox``; arguments broadcast to ``position``."""
    zero = (position * 0).to(tl.uint32)
    return tl.philox(
        seed,
        position.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + purpose,
        zero + tile.to(tl.uint32),
    )


@triton.jit
def uniform(word: tl.tensor) -> tl.tensor:
    """See ``rng.uniform``."""
    return ((word >> 9).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def token_below(word: tl.tensor, vocab_size: tl.tensor) -> tl.tensor:
    """int64 token id, see ``rng.random_tokens``."""
    return ((word.to(tl.uint64) * vocab_size) >> 32).to(tl.int64)


@triton.jit
def random_tokens(
    seed: tl.tensor,
    position: tl.tensor,
    step: tl.tensor,
    purpose: tl.constexpr,
    vocab_size: tl.constexpr,
) -> tl.tensor:
    """int64 ids, see ``rng.random_tokens``; ``seed`` points at two words, [2] int64."""
    key = seed_of(tl.load(seed), tl.load(seed + 1))
    word, _, _, _ = words(key, position, step, purpose, step * 0)
    return token_below(word, vocab_size)
