"""Score and cost of an arm, compared with another arm on the same items.

Takes one ``Outcome`` per item. Returns means, paired differences with their standard error, and the
recommended arm. Independent of engines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, quantiles, stdev
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NGRAM: Final = 8
"""Length of the n-grams whose repetition counts as a loop, in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One answer to one item."""

    score: float
    """From 0 to 1."""
    finished: bool
    """Whether the model ended its turn before max_tokens."""
    empty: bool
    repeated: float
    """Share of n-grams that repeat earlier ones of the answer."""
    tokens: int
    """Before the end of the turn, without padding."""
    denoise: int
    commits: int
    """Forwards after the prompt's that denoise a canvas, and forwards that only commit one."""
    steps: list[int]
    """Denoising steps of every canvas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of an arm over its items: shares in percent, tokens per forward as ratio of sums."""

    score: float
    finished: float
    looped: float
    empty: float
    steps: float
    p50: float
    p90: float
    tpf_all: float
    """Tokens per forward, counting every forward after the prompt's."""
    tpf_denoise: float
    """Tokens per denoising forward, for comparison with Transformers' figure."""


def summarise(outcomes: Sequence[Outcome]) -> Summary:
    """Means of at least one outcome."""
    steps = [count for one in outcomes for count in one.steps] or [0]
    tokens = sum(one.tokens for one in outcomes)
    denoise = max(sum(one.denoise for one in outcomes), 1)
    return Summary(
        score=100 * fmean(one.score for one in outcomes),
        finished=100 * fmean(one.finished for one in outcomes),
        looped=100 * fmean(one.repeated for one in outcomes),
        empty=100 * fmean(one.empty for one in outcomes),
        steps=fmean(steps),
        p50=percentile(steps, 50),
        p90=percentile(steps, 90),
        tpf_all=tokens / (denoise + sum(one.commits for one in outcomes)),
        tpf_denoise=tokens / denoise,
    )


def paired(one: Sequence[Outcome], other: Sequence[Outcome]) -> tuple[float, float]:
    """Mean difference of the score over the same items, and its standard error, in points."""
    differences = [100.0 * (a.score - b.score) for a, b in zip(one, other, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return fmean(differences), error


def recommend(
    arms: Mapping[str, Sequence[Outcome]], *, baseline: str, tolerance: float = 0.0
) -> str:
    """The arm with the most tokens per forward among those no worse than the baseline.

    No worse: the loss of score is within its own standard error, and so are, in points, the changes
    for the worse in the shares of answers that finish, loop or stay empty.

    Args:
        arms: outcomes of every arm, for the same items in the same order.
        baseline: the arm to compare with; also a candidate.
        tolerance: points of score that may be lost beyond the standard error.
    """
    first = summarise(arms[baseline])
    fit = []
    for name, outcomes in arms.items():
        difference, error = paired(outcomes, arms[baseline])
        own, slack = summarise(outcomes), tolerance + (0.0 if math.isnan(error) else error)
        worst = max(
            -difference,
            first.finished - own.finished,
            own.looped - first.looped,
            own.empty - first.empty,
        )
        if worst <= slack:
            fit.append(name)
    return max([baseline, *fit], key=lambda name: summarise(arms[name]).tpf_all)


def percentile(values: Sequence[float], percent: int) -> float:
    """Percentile of at least one value."""
    return (
        quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]
    )


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the n-grams of a text that repeat earlier ones."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
