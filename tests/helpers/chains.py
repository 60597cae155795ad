"""Random token automata, random canvases for them, and all that a small one accepts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_diffusion.constrain.automaton import native
from vllm_diffusion.constrain.automaton.class_stats import ClassStats
from vllm_diffusion.constrain.automaton.edges import Edges
from vllm_diffusion.constrain.automaton.posterior import condition
from vllm_diffusion.constrain.automaton.record import Posterior, TokenAutomaton
from vllm_diffusion.records import CanvasStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

FAR = 10**6
FORMS = ("torch", *(["C++"] if native.library() is not None else []))


def random_automaton(
    seed: int, *, states: int = 4, classes: int = 4, vocab: int = 5, density: float = 0.5
) -> TokenAutomaton:
    """States 0.. and the end behind them; token ``vocab - 1`` alone ends a text."""
    rng = np.random.default_rng(seed)
    ends = classes - 1
    class_of = rng.integers(0, ends, vocab).astype(np.int32)
    class_of[vocab - 1] = ends
    accepting = rng.random(states) < 0.3
    accepting[rng.integers(states)] = True
    goes = rng.integers(0, states, (states, classes))
    goes[rng.random((states, classes)) > density] = -1
    goes[:, 0] = -1
    goes[:, ends] = np.where(accepting, states, -1)
    return from_table(goes, accepting, class_of)


def from_table(
    goes: NDArray[np.int64], accepting: NDArray[np.bool_], class_of: NDArray[np.int32]
) -> TokenAutomaton:
    """Of a table [states, classes] of targets, -1 where there is none, trimmed to live states."""
    classes = goes.shape[1]
    accepting = np.append(accepting, True)
    goes = np.vstack([goes, np.full(classes, -1)])
    distance = np.where(accepting, 0, FAR)
    while True:
        after = np.where(goes >= 0, distance[goes], FAR).min(axis=1)
        nearer = np.minimum(distance, after + 1)
        if (nearer == distance).all():
            break
        distance = nearer
    live = distance < FAR
    live[0] = True  # the start stays, even if nothing can be said
    name = np.where(live, np.cumsum(live) - 1, -1)
    source, symbol = np.nonzero((goes >= 0) & live[:, None] & (name[goes] >= 0))
    return TokenAutomaton(
        class_of=class_of,
        num_classes=classes,
        source=name[source].astype(np.int32),
        symbol=symbol.astype(np.int32),
        target=name[goes[source, symbol]].astype(np.int32),
        num_states=int(live.sum()),
        start=0,
        accepting=accepting[live],
        distance=distance[live].astype(np.int32),
    )


def read(automaton: TokenAutomaton, state: int, tokens: Sequence[int]) -> list[int]:
    """The states before every token and behind the last, -1 from where it reads no further."""
    edges = zip(automaton.source, automaton.symbol, automaton.target, strict=True)
    goes = {(int(source), int(symbol)): int(target) for source, symbol, target in edges}
    states = [state]
    for token in tokens:
        if state != automaton.end:
            state = goes.get((state, int(automaton.class_of[token])), -1)
        states.append(state)
    return states


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """One canvas: token probabilities, and what the posterior is told of it."""

    probs: Tensor  # [L, V] fp64
    start: int
    rows: int
    left: int
    uniforms: Tensor  # [L] fp32


def random_canvas(
    seed: int, automaton: TokenAutomaton, length: int, *, spread: float = 3.0
) -> Canvas:
    """Anything that may be asked; ``spread`` is the deviation of the logits in nats."""
    draws = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    vocab = len(automaton.class_of)
    logits = torch.randn(length, vocab, generator=draws, dtype=torch.float64) * spread
    return Canvas(
        probs=logits.softmax(dim=1),
        start=int(rng.integers(automaton.num_states)),
        rows=int(rng.integers(1, length + 1)),
        left=int(rng.integers(3)),
        uniforms=torch.rand(length, generator=draws),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What enumeration says of the constrained rows of a canvas."""

    z: float
    marginal: Tensor  # [M, C] fp64, not ended and of the class
    ended: Tensor  # [M] fp64
    token: Tensor  # [M, V] fp64, marginals of the tokens
    best: float  # the largest weight of a canvas
    paths: dict[tuple[int, ...], float]  # probability of classes, -1 where ended


def enumerate_canvas(automaton: TokenAutomaton, canvas: Canvas) -> Truth:
    """Every string of tokens, one after another."""
    rows, vocab = canvas.rows, len(automaton.class_of)
    probs, class_of = canvas.probs.tolist(), automaton.class_of.tolist()
    after = {
        state: [read(automaton, state, [token])[1] for token in range(vocab)]
        for state in range(automaton.num_states)
    }
    marginal = np.zeros((rows, automaton.num_classes))
    ended, token = np.zeros(rows), np.zeros((rows, vocab))
    paths: dict[tuple[int, ...], float] = {}
    z = best = 0.0
    for tokens in product(range(vocab), repeat=rows):
        state, weight, path = canvas.start, 1.0, []
        for row, said in enumerate(tokens):
            path.append(-1 if state == automaton.end else class_of[said])
            state, weight = after[state][said], weight * probs[row][said]
            if state < 0:
                break
        if state < 0 or automaton.distance[state] > canvas.left:
            continue
        z, best = z + weight, max(best, weight)
        for row, (said, read_as) in enumerate(zip(tokens, path, strict=True)):
            token[row, said] += weight
            if read_as < 0:
                ended[row] += weight
            else:
                marginal[row, read_as] += weight
        paths[tuple(path)] = paths.get(tuple(path), 0.0) + weight
    total = z or 1.0
    return Truth(
        z=z,
        marginal=torch.from_numpy(marginal / total),
        ended=torch.from_numpy(ended / total),
        token=torch.from_numpy(token / total),
        best=best,
        paths={path: weight / total for path, weight in paths.items()},
    )


def edges_of(automaton: TokenAutomaton, form: str) -> Edges:
    """The edges for one of the ``FORMS``."""
    edges = Edges.of(automaton)
    if form == "C++":
        assert edges.merged is not None
        return edges
    return replace(edges, merged=None)


def statistics_of(automaton: TokenAutomaton, probs: Tensor) -> tuple[CanvasStats, ClassStats]:
    """What a head says of rows with these token probabilities [R, V] fp64; samples: the best."""
    class_of = torch.from_numpy(automaton.class_of).long()
    classes = torch.arange(automaton.num_classes)
    held = (class_of == classes[:, None]) & (classes[:, None] > 0)  # [C, V]
    inside = torch.where(held, probs[:, None], 0.0)  # [R, C, V]
    mass = inside.sum(dim=2)
    top = torch.cat([inside, torch.zeros_like(inside)], dim=2).topk(2, dim=2)
    within = inside / mass[..., None].clamp(min=1e-300)
    best = torch.where(mass > 0, top.indices[..., 0], -1)
    two = probs.topk(2, dim=1)
    stats = CanvasStats(
        argmax=two.indices[:, 0],
        sample=two.indices[:, 0],
        entropy=-torch.xlogy(probs, probs).sum(dim=1).float(),
        top_prob=two.values[:, 0].float(),
        margin=(two.values[:, 0] - two.values[:, 1]).float(),
        soft_embedding=torch.randn(len(probs), 3, generator=torch.Generator().manual_seed(0)),
    )
    return stats, ClassStats(
        log_mass=mass.log().float(),
        entropy=-torch.xlogy(within, within).sum(dim=2).float(),
        best=best,
        best_log_prob=top.values[..., 0].log().float(),
        second_log_prob=top.values[..., 1].log().float(),
        sample=best,
    )


def conditioned(
    automaton: TokenAutomaton, canvases: Sequence[Canvas], form: str = "torch"
) -> Posterior:
    """The posterior of canvases of one length."""
    probs = torch.stack([canvas.probs for canvas in canvases])
    stats, classes = statistics_of(automaton, probs.flatten(0, 1))
    shape = probs.shape[:2]
    return condition(
        classes.log_mass.reshape(*shape, -1),
        classes.best_log_prob.reshape(*shape, -1),
        stats.top_prob.log().reshape(shape),
        edges=edges_of(automaton, form),
        start=torch.tensor([canvas.start for canvas in canvases]),
        rows=torch.tensor([canvas.rows for canvas in canvases]),
        left=torch.tensor([canvas.left for canvas in canvases]),
        uniforms=torch.stack([canvas.uniforms for canvas in canvases]),
    )
