"""Random token automata, random canvases for them, and all that a small one accepts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_diffusion.constrain.automaton.record import TokenAutomaton

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

FAR = 10**6


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


def read(automaton: TokenAutomaton, state: int, tokens: tuple[int, ...]) -> list[int]:
    """The states before every token and behind the last, -1 from where it reads no further."""
    goes = dict(
        zip(
            zip(automaton.source.tolist(), automaton.symbol.tolist(), strict=True),
            automaton.target.tolist(),
            strict=True,
        )
    )
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
    probs, rows = canvas.probs, canvas.rows
    vocab = probs.shape[1]
    marginal = torch.zeros(rows, automaton.num_classes, dtype=torch.float64)
    ended = torch.zeros(rows, dtype=torch.float64)
    token = torch.zeros(rows, vocab, dtype=torch.float64)
    paths: dict[tuple[int, ...], float] = {}
    z = best = 0.0
    for tokens in product(range(vocab), repeat=rows):
        states = read(automaton, canvas.start, tokens)
        if states[-1] < 0 or automaton.distance[states[-1]] > canvas.left:
            continue
        weight = float(probs[range(rows), tokens].prod())
        z, best = z + weight, max(best, weight)
        path = []
        for row, (state, said) in enumerate(zip(states[:-1], tokens, strict=True)):
            read_as = -1 if state == automaton.end else int(automaton.class_of[said])
            token[row, said] += weight
            path.append(read_as)
            if read_as < 0:
                ended[row] += weight
            else:
                marginal[row, read_as] += weight
        paths[tuple(path)] = paths.get(tuple(path), 0.0) + weight
    total = z or 1.0
    return Truth(
        z=z,
        marginal=marginal / total,
        ended=ended / total,
        token=token / total,
        best=best,
        paths={path: weight / total for path, weight in paths.items()},
    )
