"""One categorical draw a row from two uniforms a vocabulary tile.

The vocabulary is cut into tiles of ``TILE`` ids. A tile is chosen by Gumbel-max over the tiles' log
masses, then the cumulative mass inside it is inverted. This is exact in distribution, needs
vocab / TILE Philox calls a row instead of vocab, and never needs two tiles at once: a streaming
head keeps the best tile so far. The tile width is part of the definition; every implementation
uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch.nn import functional

from vllm_diffusion.denoise.rng import Purpose, philox, uniform

if TYPE_CHECKING:
    from torch import Tensor

    from vllm_diffusion.records import Noise

TILE: Final = 4096
_BINS: Final = 64  # parts of a tile that the search inside it looks at first; divides TILE


def tile_uniforms(noise: Noise, num_tiles: int) -> tuple[Tensor, Tensor]:
    """The two uniforms of every row and tile, each [R, num_tiles] fp32 in (0, 1)."""
    tile = torch.arange(num_tiles, device=noise.position.device)
    word0, word1, _, _ = philox(
        noise.seed[:, None], noise.position[:, None], noise.step[:, None], Purpose.SAMPLE, tile
    )
    return uniform(word0), uniform(word1)


def sample_rows(weight: Tensor, noise: Noise) -> Tensor:
    """Draw one id a row in proportion to its weight.

    Args:
        weight: [R, V] fp32, non-negative, unnormalised; at least one positive a row.
        noise: the key of every row.

    Returns:
        [R] int64. An id of zero weight is never drawn.
    """
    rows, vocab = weight.shape
    num_tiles = -(-vocab // TILE)
    gumbel_uniform, cdf_uniform = tile_uniforms(noise, num_tiles)
    # Padding a vocabulary of less than one tile to a tile would cost many times the vocabulary.
    size = max(1, TILE // _BINS)
    width = -(-min(vocab, TILE) // size) * size
    missing = num_tiles * width - vocab
    padded = functional.pad(weight, (0, missing)) if missing else weight
    bins = padded.view(rows, num_tiles, width // size, size)
    bin_mass = bins.sum(dim=-1)
    mass = bin_mass.sum(dim=-1)
    gumbel = -torch.log(-torch.log(gumbel_uniform))
    tile = (torch.log(mass) + gumbel).argmax(dim=-1)

    # The inversion looks for the bin first and then inside it: a running sum over whole tiles would
    # cost as much as everything else here together.
    row = torch.arange(rows, device=weight.device)
    cumulative = bin_mass[row, tile].cumsum(dim=-1)
    target = cdf_uniform[row, tile] * cumulative[:, -1]
    chosen = _first_above(cumulative, target)
    # Rounding of the difference may leave the target below the bin: 0 is the first id with mass.
    target -= cumulative[row, chosen] - bin_mass[row, tile, chosen]
    target.clamp_(min=0.0)
    inside = _first_above(bins[row, tile, chosen].cumsum(dim=-1), target)
    return tile * TILE + chosen * size + inside


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """[R] index of the first running sum of [R, N] above the target, never one that adds nothing.

    Rounding may put the target on the total or past it; the answer is then the last that adds mass.
    A row of NaN gives some index in range: it must not end the process.
    """
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(index, last).clamp(max=cumulative.shape[1] - 1)
