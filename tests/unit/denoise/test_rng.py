"""Philox against its published vectors, and the claim that a number depends on its key alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from helpers.cases import for_each
from helpers.frequencies import assert_frequencies
from torch import Tensor

from vllm_diffusion.denoise.rng import (
    Purpose,
    fine_uniform,
    philox,
    random_tokens,
    request_seed,
    split_seed,
    token_words,
    uniform,
)

ONES = 0xFFFFFFFF

# kat_vectors of Random123 1.14, philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (ONES, ONES, ONES, ONES),
        (ONES, ONES),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def seed_words(*seeds: int) -> Tensor:
    return torch.tensor([split_seed(s) for s in seeds])


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    position, step, purpose, tile = counter
    words = philox(
        torch.tensor(key),
        torch.tensor(position),
        torch.tensor(step),
        purpose,  # type: ignore[arg-type]  # the vectors reach beyond the purposes we use
        tile,
    )
    assert tuple(int(w) for w in words) == expected


def test_every_coordinate_of_the_key_changes_the_number() -> None:
    coordinates = list(product((0, 1, 7), (0, 5), (0, 1, 47), Purpose, (0, 1, 63)))
    words = torch.tensor(
        [
            [int(w) for w in philox(seed_words(s)[0], torch.tensor(p), torch.tensor(n), use, tile)]
            for s, p, n, use, tile in coordinates
        ]
    )
    assert len({tuple(row) for row in words.tolist()}) == len(coordinates)
    # Unrelated words differ in half of their bits; a coordinate that only reached some rounds
    # would leave a structure here.
    differing = words[:, None, :] ^ words[None, :, :]
    bits = sum((differing >> b) & 1 for b in range(32)).sum(dim=-1).double()
    others = bits[~torch.eye(len(coordinates), dtype=torch.bool)]
    assert abs(float(others.mean()) - 64.0) < 0.5
    assert float(others.min()) > 24
    assert float(others.max()) < 104


def test_a_number_does_not_depend_on_its_neighbours() -> None:
    seeds = seed_words(3, 1 << 40, 12345, (1 << 64) - 1)
    position = torch.arange(9)[None] + torch.tensor([0, 100, 7, 262143])[:, None]
    step = torch.tensor([0, 3, 47, 1])
    together = random_tokens(seeds[:, None], position, step[:, None], Purpose.RENOISE, 512)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = random_tokens(
        seeds[order][:, None], position[order], step[order][:, None], Purpose.RENOISE, 512
    )
    assert torch.equal(shuffled, together[order])
    for row in range(4):
        for column in range(9):
            alone = random_tokens(
                seeds[row], position[row, column], step[row], Purpose.RENOISE, 512
            )
            assert int(alone) == int(together[row, column])


def test_tiles_given_as_numbers_and_as_a_tensor_agree() -> None:
    seed, position, step = seed_words(9)[0], torch.tensor(4), torch.tensor(2)
    many = philox(seed, position, step, Purpose.SAMPLE, torch.arange(5))
    for tile in range(5):
        one = philox(seed, position, step, Purpose.SAMPLE, tile)
        assert [int(w) for w in one] == [int(w[tile]) for w in many]


@for_each(coordinate=["position", "step", "seed"], vocab_size=[2, 37, 512])
def test_tokens_are_uniform_along_every_coordinate(coordinate: str, vocab_size: int) -> None:
    count = 40_000
    line, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    seed = torch.stack([line, zero], dim=-1) if coordinate == "seed" else seed_words(1)
    tokens = random_tokens(
        seed,
        line if coordinate == "position" else zero,
        line if coordinate == "step" else zero,
        Purpose.RENOISE,
        vocab_size,
    )
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < vocab_size
    assert_frequencies(tokens, torch.ones(vocab_size))


def test_consecutive_tokens_are_independent() -> None:
    tokens = random_tokens(
        seed_words(5), torch.arange(60_000), torch.tensor(0), Purpose.INITIAL_CANVAS, 16
    )
    pairs = tokens[0::2] * 16 + tokens[1::2]
    assert_frequencies(pairs, torch.ones(256))


def test_uniform_is_uniform() -> None:
    word = philox(seed_words(11), torch.arange(50_000), torch.tensor(0), Purpose.SAMPLE)[0]
    assert_frequencies((uniform(word) * 64).long(), torch.ones(64))


@for_each(word=[0, 1, 255, 256, 1 << 31, ONES - 256, ONES - 255, ONES])
def test_uniform_is_inside_the_open_interval(word: int) -> None:
    # 0 or 1 would make a Gumbel infinite: an infinite one beside a tile of no mass is NaN.
    value = uniform(torch.tensor(word))
    assert value.dtype == torch.float32
    assert 0.0 < float(value) < 1.0


def test_uniform_is_exact_in_fp32() -> None:
    # Exact means that every device computes the same number, whatever it fuses or rounds.
    word = torch.tensor([0, 12345678, 1 << 31, (1 << 31) + 4096, ONES])
    exact = ((word >> 9).double() + 0.5) / (1 << 23)
    assert torch.equal(uniform(word).double(), exact)


def test_a_client_seed_is_the_key_and_a_missing_one_comes_from_the_request_id() -> None:
    assert request_seed(7, "a") == request_seed(7, "b") == 7
    assert request_seed(-1, "a") == (1 << 64) - 1
    assert request_seed(None, "a") == request_seed(None, "a")
    assert request_seed(None, "a") != request_seed(None, "b")
    assert 0 <= request_seed(None, "a") < 1 << 64
    # Pinned: a release that changed it would change every unseeded generation.
    assert request_seed(None, "request-1") == 7239539881221587450


@for_each(seed=[0, 1, 0xDEADBEEF, 1 << 32, (1 << 64) - 1])
def test_split_seed_keeps_all_64_bits(seed: int) -> None:
    low, high = split_seed(seed)
    assert 0 <= low < 1 << 32
    assert low + (high << 32) == seed


# ---- a number per token ----


def test_words_of_tokens_are_murmurs_finaliser_with_a_second_key() -> None:
    def mixed(token: int, one: int, two: int) -> int:
        word = (token + one) % 2**32
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32 ^ two
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    for token, one, two in product((0, 1, 262143), (0, 7, ONES), (0, 0x9E3779B9, ONES)):
        key = torch.tensor(one), torch.tensor(two)
        assert int(token_words(key, torch.tensor(token))) == mixed(token, one, two)
    # fmix32 of MurmurHash3 itself, where the second word is 0.
    assert int(token_words((torch.tensor(0), torch.tensor(0)), torch.tensor(1))) == 0x514E28B7


def test_tokens_of_one_row_have_words_like_any_random_numbers() -> None:
    key = torch.tensor(123456789), torch.tensor(987654321)
    words = token_words(key, torch.arange(1 << 18))
    assert len(words.unique()) == 1 << 18  # the mix is a bijection
    assert_frequencies(words >> 24, torch.ones(256))
    assert_frequencies(words & 255, torch.ones(256))


def test_fine_uniforms_are_open_and_keep_small_words_apart() -> None:
    words = torch.tensor([0, 1, 2, 255, 1 << 31, ONES - 1, ONES])
    numbers = fine_uniform(words)
    assert numbers.dtype == torch.float32
    assert bool(((numbers > 0) & (numbers < 1)).all())
    assert len(numbers[:5].unique()) == 5
