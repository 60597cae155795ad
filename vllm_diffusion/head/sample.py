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

from vllm_diffusion.denoise.rng import Purpose, fine_uniform, philox, token_words, uniform

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
    width = padded_width(min(vocab, TILE))
    missing = num_tiles * width - vocab
    padded = functional.pad(weight, (0, missing)) if missing else weight
    bins = padded.view(rows, num_tiles, -1, bin_size())
    bin_mass = bins.sum(dim=-1)
    tile = tile_scores(bin_mass.sum(dim=-1), gumbel_uniform).argmax(dim=-1)
    row = torch.arange(rows, device=weight.device)
    inside = invert(bins[row, tile], bin_mass[row, tile], cdf_uniform[row, tile])
    return tile * TILE + inside


def sample_listed(weight: Tensor, ids: Tensor, vocab: int, noise: Noise) -> Tensor:
    """The draw of ``sample_rows`` where all but a few ids have zero weight.

    Args:
        weight: [R, N] fp32, of the listed ids.
        ids: [N] or [R, N] int64, ascending.
        vocab: ids there are.
        noise: the key of every row.

    Returns:
        [R] int64, places in the list.
    """
    num_tiles = -(-vocab // TILE)
    gumbel_uniform, cdf_uniform = tile_uniforms(noise, num_tiles)
    tile_of = (ids // TILE).expand(weight.shape)
    mass = weight.new_zeros(len(weight), num_tiles).scatter_add_(1, tile_of, weight)
    tile = tile_scores(mass, gumbel_uniform).argmax(dim=-1, keepdim=True)
    cumulative = torch.where(tile_of == tile, weight, 0.0).cumsum(dim=-1)
    return _first_above(cumulative, cdf_uniform.gather(1, tile)[:, 0] * cumulative[:, -1])


def class_keys(noise: Noise) -> tuple[Tensor, Tensor]:
    """Two words of every row, each [R] int64: the key of its race inside classes."""
    word0, word1, _, _ = philox(noise.seed, noise.position, noise.step, Purpose.CLASS)
    return word0, word1


def race(weight: Tensor, key: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
    """Scores whose largest, among any of the ids, is a draw of one of these by weight.

    An exponential race: w / -log(u), a number of its own for every id and row, so that neither the
    order of the ids nor what they are classed with matters.

    Args:
        weight: [R, N], non-negative.
        key: of every row, see ``class_keys``.
        ids: [N] int64.

    Returns:
        [R, N], 0 where the weight is.
    """
    word = token_words((key[0][:, None], key[1][:, None]), ids)
    return weight / -torch.log1p(-fine_uniform(word).to(weight.dtype))


def tile_scores(mass: Tensor, uniform: Tensor) -> Tensor:
    """Log mass plus Gumbel noise: the tile with the highest score is drawn, shapes as given."""
    return torch.log(mass) - torch.log(-torch.log(uniform))


def invert(bins: Tensor, bin_mass: Tensor, uniform: Tensor) -> Tensor:
    """Where in a tile a share of its mass is reached.

    Looks for the bin first and then inside it: a running sum over whole tiles would cost as much as
    everything else here together.

    Args:
        bins: [R, N, size] fp32, weights of one tile a row.
        bin_mass: [R, N] fp32, their sums.
        uniform: [R] fp32, in (0, 1).

    Returns:
        [R] int64, places in the tile.
    """
    row = torch.arange(len(bins), device=bins.device)
    cumulative = bin_mass.cumsum(dim=-1)
    target = uniform * cumulative[:, -1]
    chosen = _first_above(cumulative, target)
    # Rounding of the difference may leave the target below the bin: 0 is the first id with mass.
    target -= cumulative[row, chosen] - bin_mass[row, chosen]
    target.clamp_(min=0.0)
    return chosen * bins.shape[-1] + _first_above(bins[row, chosen].cumsum(dim=-1), target)


def bin_size() -> int:
    """Ids that the search inside a tile takes together."""
    return max(1, TILE // _BINS)


def padded_width(width: int) -> int:
    """Columns of a tile of ``width`` ids, its last bin filled up."""
    return -(-width // bin_size()) * bin_size()


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """[R] index of the first running sum of [R, N] above the target, never one that adds nothing.

    Rounding may put the target on the total or past it; the answer is then the last that adds mass.
    A row of NaN gives some index in range: it must not end the process.
    """
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())[:, 0]
    return torch.minimum(index, last).clamp(max=cumulative.shape[1] - 1)
