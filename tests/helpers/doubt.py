"""Which decisions of a run hang on rounding.

Two correct engines compute logits that differ in the last bits. A decision whose edge lies within
that difference may fall either way, and everything after it follows: a test that asks for equal
tokens must not be decided there. ``doubts`` names such decisions of an oracle run, ``decided_run``
finds a seed that has none.
"""

from __future__ import annotations

from math import sqrt
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.head.sample import TILE, tile_uniforms
from vllm_diffusion.records import Noise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from helpers.oracle import Oracle, OracleRun, OracleStep

LOGIT_SPREAD: Final = 2e-6
"""Standard deviation of what two engines' fp32 logits differ by; 0.7e-6 to 1.5e-6 is measured."""

_DEVIATIONS = 5.0  # as far from an edge as a difference will hardly ever carry
_ROUNDING = 1e-6  # of entropies and cumulative sums themselves, in fp32


def decided_run(
    oracle: Oracle,
    prompt: Sequence[int],
    seed: int,
    **how: Any,
) -> tuple[int, OracleRun]:
    """The first seed of ``seed``, ``seed + 1000``, ... under which nothing hangs on rounding."""
    found = []
    for candidate in range(seed, seed + 30_000, 1000):
        run = oracle.generate(prompt, seed=candidate, **how)
        found = doubts(oracle, run, candidate, overrides=how.get("overrides"))
        if not found:
            return candidate, run
    raise AssertionError(f"30 seeds from {seed} on are all in doubt, the last one at {found}")


def doubts(
    oracle: Oracle, run: OracleRun, seed: int, *, overrides: Mapping[str, Any] | None = None
) -> list[str]:
    """Every decision of the run that an error of ``LOGIT_SPREAD`` a logit could turn.

    ``overrides`` are the generation constants the run was made with, as in ``Oracle.generate``.
    """
    config = SimpleNamespace(**{**oracle.model.generation_config.to_dict(), **(overrides or {})})
    bound = config.sampler_config
    bound = bound["entropy_bound"] if isinstance(bound, dict) else bound.entropy_bound
    found = []
    for number, canvas in enumerate(run.canvases):
        argmax: Tensor | None = None
        for step in canvas.steps:
            still = argmax is not None and torch.equal(argmax, step.argmax)
            argmax = step.argmax
            found += [
                f"canvas {number} step {step.step}: {what}"
                for what in _doubts_of(
                    step,
                    seed,
                    bound=bound,
                    confidence=config.confidence_threshold if still else None,
                )
            ]
    return found


def _doubts_of(step: OracleStep, seed: int, *, bound: float, confidence: float | None) -> list[str]:
    logits = step.logits.double() / step.temperature
    error = _DEVIATIONS * LOGIT_SPREAD / step.temperature
    log_prob = logits.log_softmax(-1)
    prob = log_prob.exp()
    found = []

    top = logits.topk(2, dim=-1).values
    if float((top[:, 0] - top[:, 1]).min()) <= error * sqrt(2):
        found.append("argmax")

    # F_i = sum of p_j up to i and dp_j = p_j (dz_j - mean dz), so with independent errors
    # var F_i = var z * (S_i (1 - F_i)^2 + (S - S_i) F_i^2), where S_i sums p_j^2 up to i.
    cumulative, squares = prob.cumsum(-1), prob.square().cumsum(-1)
    variance = squares * (1 - cumulative) ** 2 + (squares[:, -1:] - squares) * cumulative**2
    distance = (cumulative - _targets(step, seed)[:, None]).abs()
    if bool((distance <= error * variance.clamp(min=0).sqrt() + _ROUNDING).any()):
        found.append("sample")

    # dH = -sum p_j dz_j (log p_j + H).
    entropy = -(prob * log_prob).sum(-1)
    wobble = error * (prob * (log_prob + entropy[:, None])).square().sum(-1).sqrt() + _ROUNDING
    order = entropy.argsort()
    entropy, wobble = entropy[order], wobble[order]
    spent = entropy.cumsum(0) - entropy
    if bool(((spent - bound).abs() <= wobble.square().cumsum(0).sqrt()).any()):
        found.append("acceptance bound")
    accepted = int((spent <= bound).sum())
    if accepted < len(entropy):
        last, first = accepted - 1, accepted
        if float(entropy[first] - entropy[last]) <= float(wobble[first] + wobble[last]):
            found.append("order of entropies at the acceptance bound")
    edge = None if confidence is None else abs(float(entropy.mean()) - confidence)
    if edge is not None and edge <= float(wobble.mean()):
        found.append("stop")
    return found


def _targets(step: OracleStep, seed: int) -> Tensor:
    """[L] where in the cumulative distribution every position's draw falls."""
    rows, vocab = step.logits.shape
    assert vocab <= TILE, "with several tiles the choice of the tile has edges too"
    noise = Noise(
        seed=torch.tensor([split_seed(seed)]).expand(rows, 2),
        position=step.start + torch.arange(rows),
        step=torch.full((rows,), step.step),
    )
    return tile_uniforms(noise, 1)[1][:, 0].double()
