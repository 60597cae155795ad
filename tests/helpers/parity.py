"""What the parity tests share: a checkpoint fit for them, prompts, and one comparison.

A parity test follows hundreds of steps, each fed with the one before, so it can only ask for
equality where the loop does not amplify rounding. ``conditioned_checkpoint`` makes such a model,
and a test proves it: Transformers in fp64 must agree with Transformers in fp32 first of all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import load_file, save_file

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import TinySpec, make_tiny_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from torch import Tensor
    from vllm import LLM

    from helpers.oracle import OracleCanvas, OracleRun
    from helpers.probe import ProbedRun, ProbedStep

TOLERANCE: Final = 1e-4
"""Largest difference of a logit, a key or a value, in fp32; what rounding leaves is near 1e-5."""

PAGE: Final = 32
"""Block size of the paged cache, the smallest the CPU kernels take."""

SPEC: Final = TinySpec(sliding_window=56)
"""A window that is no multiple of the page or the canvas, so the three boundaries lie apart; some
pictures are shorter than it, in soft tokens, and some longer."""

ENGINE: Final[dict[str, Any]] = {
    "block_size": PAGE,
    # Keep a sliding layer's pages of generated text too: the default keeps those of the prompt
    # alone, and a second turn would never find a committed canvas.
    "prefix_cache_retention_interval": None,
}
"""What parity engines set beyond the shared defaults of ``helpers.engines``."""

# Random weights feed a canvas's belief back to itself strongly enough to double a rounding error
# with every step. At a tenth the error stays below 1e-5, and canvases still take 18 to 38 steps.
_SELF_CONDITIONING_GAIN = 0.1


def conditioned_checkpoint(
    path: Path, spec: TinySpec = SPEC, *, equal_scalars: bool = False
) -> Path:
    """A tiny checkpoint whose denoising loop does not amplify rounding.

    Args:
        path: folder to make it in.
        spec: its sizes.
        equal_scalars: give the encoder the decoder's layer scalars, as in the released weights;
            otherwise every layer's two scalars differ.
    """
    make_tiny_checkpoint(path, spec)
    file = path / "model.safetensors"
    weights = load_file(file)
    weights["model.decoder.self_conditioning.down_proj.weight"] *= _SELF_CONDITIONING_GAIN
    for layer in range(spec.layers):
        decoder = weights[f"model.decoder.layers.{layer}.layer_scalar"]
        encoder = weights[f"model.encoder.language_model.layers.{layer}.layer_scalar"]
        assert not torch.equal(encoder, decoder), "the maker should set the two scalars apart"
        if equal_scalars:
            encoder.copy_(decoder)
    save_file(weights, file, metadata={"format": "pt"})
    return path


WHOLE_CANVASES: Final[dict[str, Any]] = {"max_tokens": 3 * SPEC.canvas, "ignore_eos": True}
"""Sampling parameters under which a request writes three canvases, whatever stands in them."""


def scheduler_of(llm: LLM) -> Any:
    """The engine's scheduler."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def make_prompt(length: int, variant: int = 0, vocab: int = 512) -> list[int]:
    """Token ids without special ones; another variant shares no prefix."""
    return [
        12 + (7 * i * i + 13 * i + 9 + 101 * variant * (i + 1)) % (vocab - 22)
        for i in range(length)
    ]


def generate(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    **sampling: Any,
) -> list[list[int]]:
    """Token ids of every prompt; three canvases and no stop at end tokens unless told otherwise."""
    from vllm import SamplingParams

    wanted = WHOLE_CANVASES | sampling
    outputs = llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts],
        [SamplingParams(seed=seed, **wanted) for seed in seeds],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_parity(
    ours: ProbedRun, theirs: OracleRun, *, window: int = SPEC.sliding_window, cached: int = 0
) -> None:
    """Every number and every token of a request against the oracle's.

    Args:
        ours: what the probe saw.
        theirs: what Transformers did.
        window: the sliding layers', of whose cache only what a canvas can see is compared.
        cached: leading positions that came out of the prefix cache, which no forward computed.
    """
    # In the order in which a forward feeds the next, so the first failure is the cause.
    _assert_text(ours, theirs, range(cached, len(theirs.prompt)))
    assert [canvas[0].start for canvas in ours.canvases] == [c.start for c in theirs.canvases]
    for number, (canvas, expected) in enumerate(zip(ours.canvases, theirs.canvases, strict=True)):
        _assert_context(ours, theirs, expected.start, window)
        _assert_canvas(number, canvas, expected)
        assert (expected.start, expected.tokens.tolist()) in ours.commits
        behind = min(expected.start + len(expected.tokens), len(theirs.hidden))
        _assert_text(ours, theirs, range(expected.start, behind))


def _assert_text(ours: ProbedRun, theirs: OracleRun, positions: Iterable[int]) -> None:
    for position in positions:
        assert position in ours.hidden, f"position {position} was never computed as text"
        assert_near(ours.hidden[position], theirs.hidden[position], f"hidden state {position}")


def _assert_context(ours: ProbedRun, theirs: OracleRun, start: int, window: int) -> None:
    context = ours.contexts[start]
    assert context.length == start
    assert sorted(context.keys) == list(range(len(theirs.keys)))
    for layer, keys in context.keys.items():
        # vLLM frees a sliding layer's pages as the window passes them. The last layer is full; a
        # full one before it is compared as far as a sliding one.
        sliding = layer + 1 < len(theirs.keys)
        seen = slice(max(0, start - (window - 1)) if sliding else 0, start)
        where = f"layer {layer} of the cache before the canvas at {start}"
        assert_near(keys[seen], theirs.keys[layer][seen], f"keys, {where}")
        assert_near(context.values[layer][seen], theirs.values[layer][seen], f"values, {where}")


def _assert_canvas(number: int, ours: list[ProbedStep], theirs: OracleCanvas) -> None:
    for mine, expected in zip(ours, theirs.steps, strict=False):
        where = f"canvas {number} step {mine.step}"
        assert_same(mine.canvas, expected.canvas, f"input, {where}")
        assert_near(mine.logits, expected.logits, f"logits, {where}")
        assert_same(mine.argmax, expected.argmax, f"argmax, {where}")
        assert_same(mine.sample, expected.sample, f"sample, {where}")
        assert_same(mine.accept, expected.accept, f"accepted positions, {where}")
        assert_same(mine.next_canvas, expected.next_canvas, f"next input, {where}")
    assert len(ours) == len(theirs.steps), (
        f"canvas {number}: {len(ours)} steps, Transformers takes {len(theirs.steps)}"
    )


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal to ``TOLERANCE`` everywhere."""
    assert ours.shape == theirs.shape, f"{what}: shape {ours.shape}, expected {theirs.shape}"
    worst = float((ours - theirs).abs().max()) if ours.numel() else 0.0
    assert worst < TOLERANCE, f"{what}: off by {worst:.1e}, allowed {TOLERANCE:.0e}"


def assert_same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal in every position."""
    wrong = (ours != theirs).nonzero().flatten().tolist()
    assert not wrong, (
        f"{what}: positions {wrong} hold {ours[wrong].tolist()}, expected {theirs[wrong].tolist()}"
    )
