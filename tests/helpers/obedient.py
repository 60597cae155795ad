"""Constraints in an engine without a compiler and without conditioning: stand-ins for both.

The compiler takes the quoted words of a constraint for a list of choices. The rule of a step writes
a shortest text of the automaton on every constrained canvas it is shown. What is left to test is
what lies between the two: transport, slots, states, vLLM's own net.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.automata import of_choices
from vllm_diffusion import step
from vllm_diffusion.engine import sampler
from vllm_diffusion.engine.compiler import Compiler
from vllm_diffusion.errors import ConstraintError
from vllm_diffusion.records import Commit

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from vllm_diffusion.constrain.automaton.record import TokenAutomaton
    from vllm_diffusion.constrain.automaton.slots import ConstrainedCanvases
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision, Emission


def make_obedient(patch: pytest.MonkeyPatch, seen: list[Any] | None = None) -> None:
    """Put both stand-ins in place; what every step was shown goes to ``seen``."""

    def compiled(self: Compiler, key: Any, end_ids: frozenset[int]) -> TokenAutomaton:
        words = re.findall(r'"([^"]*)"', key[1])
        if not words:
            raise ConstraintError(f"the stand-in knows nothing but choices, got {key[1]!r}")
        encode = self._tokenizer.encode
        choices = [encode(word, add_special_tokens=False) for word in words]
        return of_choices(choices, end_ids, self._vocab_size)

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

    patch.setattr(Compiler, "_compiled", compiled)
    patch.setattr(sampler, "advance", advance)


def write_shortest(group: ConstrainedCanvases, tokens: Any) -> None:
    """Overwrite the constrained rows of some canvases by the shortest way to the end."""
    automaton = group.automaton
    for canvas, start, rows in zip(
        group.canvas.tolist(), group.start.tolist(), group.rows.tolist(), strict=True
    ):
        state = start
        for row in range(rows):
            if state == automaton.end:
                break
            leaving = (automaton.source == state).nonzero()[:, 0].tolist()
            # An accepting state is left for the end, any other towards an accepting one.
            edge = min(leaving, key=lambda e: (int(automaton.distance[automaton.target[e]]), -e))
            symbol, state = int(automaton.symbol[edge]), int(automaton.target[edge])
            tokens[canvas, row] = (automaton.class_of == symbol).nonzero()[0, 0]
