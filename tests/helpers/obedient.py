"""Constraints in an engine without conditioning: a stand-in for it.

The rule of a step writes a shortest text of the automaton on every constrained canvas it is shown.
What is left to test is what lies before and behind: transport, slots, states, vLLM's own net.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_diffusion import step
from vllm_diffusion.engine import sampler
from vllm_diffusion.records import Commit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from vllm_diffusion.constrain.automaton.slots import ConstrainedCanvases
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision, Emission


def make_obedient(patch: pytest.MonkeyPatch, seen: list[Any] | None = None) -> None:
    """Put the stand-in in place; what every step was shown goes to ``seen``."""

    def advance(
        *args: Any, automata: Sequence[ConstrainedCanvases] = (), **options: Any
    ) -> Emission:
        if seen is not None:
            seen.append(automata)

        def rule(pool: Any, batch: CanvasBatch, stats: CanvasStats) -> Decision:
            decision = step.decide(pool, batch, stats)
            tokens = stats.argmax.clone()
            for group in automata:
                write_shortest(group, tokens)
            rows = np.arange(tokens.shape[1])
            commit = Commit(
                tokens=tokens,
                rows=tokens.new_tensor(rows).expand_as(tokens),
                count=batch.width,
            )
            return replace(decision, commit=commit)

        return step.advance(*args, **options | {"rule": rule})

    patch.setattr(sampler, "advance", advance)


def write_shortest(group: ConstrainedCanvases, tokens: Any) -> None:
    """Overwrite the constrained rows of some canvases by the shortest way to the end."""
    edges, class_of = group.automaton.edges, group.automaton.class_of
    for canvas, start, rows in zip(
        group.canvas.tolist(), group.start.tolist(), group.rows.tolist(), strict=True
    ):
        state = start
        for row in range(rows):
            if state == edges.end:
                break
            leaving = (edges.source == state).nonzero()[:, 0].tolist()
            # An accepting state is left for the end, any other towards an accepting one.
            edge = min(leaving, key=lambda e: (int(edges.distance[edges.target[e]]), -e))
            symbol, state = int(edges.symbol[edge]), int(edges.target[edge])
            tokens[canvas, row] = (class_of == symbol).nonzero()[0, 0]
