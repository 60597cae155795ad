"""Are draws distributed as they should be? Pearson's chi-square, with no dependency on scipy."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# 4 standard deviations of the normal that Wilson and Hilferty map chi-square to: a correct sampler
# passes a new seed with probability 0.99997, and the tests' seeds are fixed.
_DEVIATIONS = 4.0

# Pearson's statistic follows chi-square only where a cell expects a handful of draws.
_LEAST_EXPECTED = 5.0


def chi_square_limit(degrees: int) -> float:
    """What chi-square with this many degrees of freedom exceeds with probability 3e-5.

    Wilson and Hilferty (1931): (X / k) ** (1/3) is close to normal with mean 1 - 2/(9k) and
    variance 2/(9k).
    """
    spread = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - spread + _DEVIATIONS * sqrt(spread)) ** 3


def chi_square(draws: Tensor, probability: Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom.

    Args:
        draws: [N] int64 ids.
        probability: [V], need not be normalised. Ids too rare to expect five draws share one cell;
            an id of probability 0 that was drawn anyway makes the statistic infinite.
    """
    probability = probability.double() / probability.double().sum()
    observed = torch.bincount(draws, minlength=probability.numel()).double()
    if bool((observed[probability == 0] > 0).any()):
        return float("inf"), 1
    expected = probability * draws.numel()
    rare = expected < _LEAST_EXPECTED
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    used = expected >= _LEAST_EXPECTED
    statistic = ((observed - expected) ** 2 / expected)[used].sum()
    return float(statistic), max(int(used.sum()) - 1, 1)


def assert_frequencies(draws: Tensor, probability: Tensor) -> None:
    """Fail when the draws cannot have come from this distribution."""
    statistic, degrees = chi_square(draws, probability)
    limit = chi_square_limit(degrees)
    assert statistic < limit, (
        f"{draws.numel()} draws: chi-square {statistic:.1f} with {degrees} degrees of freedom, "
        f"expected below {limit:.1f}"
    )
