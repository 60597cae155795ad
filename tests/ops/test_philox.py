"""Noise inside Triton kernels, run by Triton's interpreter, against ``denoise.rng``.

The interpreter is chosen when Triton is imported, so one subprocess runs this very file.
"""

from __future__ import annotations

from helpers.interpreter import interpreted


def test_kernels_draw_the_numbers_of_the_definition() -> None:
    assert interpreted(__file__) == "numbers agree"


def in_the_interpreter() -> None:
    import torch
    import triton
    import triton.language as tl

    from vllm_diffusion.denoise import philox, rng

    purpose, vocab = rng.Purpose.RENOISE, 262144
    globals().update(philox=philox, tl=tl)  # kernels look names up in their module

    @triton.jit
    def draw(seeds, positions, steps, tiles, out, uniforms, tokens, N: tl.constexpr):  # noqa: N803, PLR0917
        at = tl.arange(0, N)
        seed = philox.seed_of(tl.load(seeds), tl.load(seeds + 1))
        w0, w1, w2, w3 = philox.words(
            seed, tl.load(positions + at), tl.load(steps + at), 2, tl.load(tiles + at)
        )
        tl.store(out + at, w0.to(tl.int64))
        tl.store(out + N + at, w1.to(tl.int64))
        tl.store(out + 2 * N + at, w2.to(tl.int64))
        tl.store(out + 3 * N + at, w3.to(tl.int64))
        tl.store(uniforms + at, philox.uniform(w1))
        tl.store(tokens + at, philox.token_below(w0, 262144))

    assert int(purpose) == 2
    n = 64
    for seed in (0, 7, 2**32 - 1, 2**32, 2**64 - 1):
        words = torch.tensor(rng.split_seed(seed))
        position = torch.arange(n) * 2_000_003
        step, tile = torch.arange(n) % 48, torch.arange(n).flip(0)
        out = torch.empty(4, n, dtype=torch.int64)
        uniforms, tokens = torch.empty(n), torch.empty(n, dtype=torch.int64)
        draw[(1,)](words, position, step, tile, out, uniforms, tokens, N=n)
        expected = rng.philox(words, position, step, purpose, tile)
        assert torch.equal(out, torch.stack(expected))
        assert torch.equal(uniforms, rng.uniform(expected[1]))
        assert torch.equal(tokens, (expected[0] * vocab) >> 32)
    print("numbers agree")


if __name__ == "__main__":
    in_the_interpreter()
