"""What tests of fused commits share, however steps are scheduled."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import RequestOutputKind

from helpers.parity import SPEC
from vllm_diffusion.rules.entropy_bound import EntropyBound

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

    from helpers.probe import Probe
    from vllm_diffusion.canvas import CanvasPool
    from vllm_diffusion.records import CanvasBatch, CanvasStats, Decision

WINDOW = SPEC.sliding_window
EXACT = 1e-5


def assert_same_run(fused: Probe, separate: Probe, seed: int) -> None:
    """Logits of every step, the cache before every canvas, every token."""
    mine, other = fused.run(seed), separate.run(seed)
    assert mine.commits == other.commits
    for canvas, expected in zip(mine.canvases, other.canvases, strict=True):
        for step, wanted in zip(canvas, expected, strict=True):
            assert torch.equal(step.canvas, wanted.canvas)
            assert (step.logits - wanted.logits).abs().max() < EXACT
        start = canvas[0].start
        for layer, keys in mine.contexts[start].keys.items():
            # A sliding layer's pages are given back as the window passes them; the last is full.
            full = layer + 1 == len(mine.contexts[start].keys)
            seen = slice(0 if full else max(0, start - (WINDOW - 1)), start)
            wanted_keys = other.contexts[start].keys[layer]
            assert (keys[seen] - wanted_keys[seen]).abs().max() < EXACT
            values, wanted_values = (each.contexts[start].values[layer] for each in (mine, other))
            assert (values[seen] - wanted_values[seen]).abs().max() < EXACT


class PartOf(EntropyBound):
    """A rule that commits a part of every canvas, another part of each."""

    def decide(self, pool: CanvasPool, batch: CanvasBatch, stats: CanvasStats) -> Decision:
        decision = super().decide(pool, batch, stats)
        count = 1 + 7 * batch.position[:, 0] % 23
        return replace(decision, commit=replace(decision.commit, count=count))


def texts(llm: LLM, asked: list[tuple[list[int], SamplingParams]], disturb: Any) -> list[list[int]]:
    """Step the engine until all are done; what each was given, piece by piece, put together."""
    given: list[list[int]] = [[] for _ in asked]
    for name, (prompt, wish) in enumerate(asked):
        wish.output_kind = RequestOutputKind.DELTA
        llm.llm_engine.add_request(str(name), {"prompt_token_ids": prompt}, wish)
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        disturb(step)
        for output in llm.llm_engine.step():
            given[int(output.request_id)] += output.outputs[0].token_ids
        step += 1
        assert step < 500, "the engine makes no progress"
    return given
