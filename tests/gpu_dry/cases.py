"""The requests that a pretended GPU and the ordinary CPU engine are both asked.

Random weights: every distribution is wide, so the noise, the masks and the rules all show in the
tokens. A canvas of 8, a window of 32: most prompts reach past it. No
window can be narrower: an image here is 60 rows, and one of 2W or more would be cut.
"""

from __future__ import annotations

from typing import Any, Final

from vllm_diffusion.models.diffusion_gemma.testing import checkpoint as diffusion_gemma
from vllm_diffusion.models.llada.testing import checkpoint as llada
from vllm_diffusion.models.sdar.testing import checkpoint as sdar

SPEC: Final = diffusion_gemma.TinySpec(
    seed=5,
    canvas=8,
    hidden=32,
    layers=2,
    vocab=288,
    heads=2,
    kv_heads=1,
    head_dim=32,
    full_kv_heads=1,
    full_head_dim=64,
    intermediate=32,
    experts=4,
    experts_per_token=2,
    expert_intermediate=32,
    sliding_window=32,
    max_positions=512,
    max_steps=4,
)
MADE: Final[dict[str, tuple[Any, Any]]] = {
    "diffusion_gemma": (diffusion_gemma, SPEC),
    "sdar": (
        sdar,
        sdar.TinySpec(seed=5, block=4, hidden=64, layers=2, vocab=320, heads=2, kv_heads=1),
    ),
    "llada": (llada, llada.TinySpec(seed=5, hidden=64, layers=2, vocab=320, heads=2, kv_heads=2)),
}
"""Of each family what makes the small checkpoint, and its sizes."""
SCHEMA: Final = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


def words(start: int, count: int) -> list[int]:
    """Prompt ids; no special token among them."""
    return [40 + (start * 37 + n * n * 11 + n) % 200 for n in range(count)]


def case(prompt: list[int], *, tokens: int = 16, image: bool = False, **sampling: Any) -> Any:
    return {
        "prompt": prompt,
        "image": image,
        "sampling": {"max_tokens": tokens, "ignore_eos": True, **sampling},
    }


READ: Final = {
    "diffusion_seed_canvas": [99, 5, 0, 0, 0, 0, 0, 0],
    "diffusion_max_steps": 1,
    "diffusion_read_only": True,
}
"""As vLLM reads the label of a decision."""

FIRST: Final[dict[str, Any]] = {
    "plain": case(words(1, 60), tokens=24, seed=1),
    "short": case(words(2, 3), seed=2),
    "temperature": case(words(3, 40), temperature=0.5, seed=3),
    "image": case([], image=True, seed=4),
    "chunked prefill": case(words(5, 150), seed=5),
    "top_p": case(words(6, 50), top_p=0.7, seed=6),
    "penalties": case(words(7, 40), frequency_penalty=0.9, repetition_penalty=1.3, seed=7),
    "logprobs": case(words(8, 36), logprobs=2, seed=8),
    "json schema": case(words(9, 20), structured_outputs={"json": SCHEMA}, seed=9),
    "decision": case(words(12, 30), tokens=2, logprob_token_ids=[50, 60, 70], extra_args=READ),
    "decision, other labels": case(
        words(13, 44), tokens=2, logprob_token_ids=[70, 80], extra_args=READ
    ),
}
"""Asked at once."""

SECOND: Final[dict[str, Any]] = {"prefix": case(words(10, 90), seed=10)}
"""Asked when those are done, whose blocks may be gone by then."""

THIRD: Final[dict[str, Any]] = {
    "prefix hit": case([*words(10, 90)[:64], *words(11, 9)], seed=11),
    "prefix hit, whole": case(words(10, 90), seed=12),
}
"""Asked when that is done."""

OPTIONS: Final[dict[str, Any]] = {
    name: case(words(20 + number, 20), seed=20 + number, **sampling)
    for number, (name, sampling) in enumerate(
        {
            "nothing": {},
            "temperature": {"temperature": 0.5},
            "greedy": {"temperature": 0.0},
            "min_tokens": {"min_tokens": 9},
            "top_p": {"top_p": 0.7},
            "top_k": {"top_k": 20},
            "min_p": {"min_p": 0.05},
            "penalties": {"frequency_penalty": 0.9, "repetition_penalty": 1.3},
            "logit_bias": {"logit_bias": {50: 3.0, 60: -3.0}},
            "bad_words": {"bad_words": ["ab", "c"]},
            "allowed_token_ids": {"allowed_token_ids": list(range(40, 90))},
            "logprobs": {"logprobs": 2},
            "logprob_token_ids": {"logprob_token_ids": [50, 60, 70]},
            "json schema": {"structured_outputs": {"json": SCHEMA}},
            "soft embedding of few": {"extra_args": {"diffusion_soft_embedding_top_k": 16}},
            "pins": {"extra_args": {"diffusion_seed_canvas": [50] * 8, "diffusion_pinned": [0, 2]}},
        }.items()
    )
}
"""Each asked alone, so that what waits for the device is told by its name."""

SDAR_FIRST: Final[dict[str, Any]] = {
    "plain": case(words(1, 60), tokens=18, seed=1),
    "short": case(words(2, 3), seed=2),
    "tail": case(words(3, 41), tokens=11, temperature=0.5, seed=3),
    "chunked prefill": case(words(5, 150), seed=5),
    "top_p": case(words(6, 50), top_p=0.7, seed=6),
    "logprobs": case(words(8, 38), tokens=9, logprobs=2, seed=8),
    "commits apart": case(words(9, 21), extra_args={"diffusion_fused_commit": False}, seed=9),
}
"""Blocks of 4: prompts that end on the grid and off it."""

IN_TWO_STEPS: Final = {"diffusion_max_steps": 2}
LLADA: Final[dict[str, Any]] = {
    "plain": case(words(1, 40), seed=1, extra_args=IN_TWO_STEPS),
    "short": case(words(2, 3), tokens=21, seed=2, extra_args=IN_TWO_STEPS),
    "temperature": case(words(3, 29), temperature=0.5, seed=3, extra_args=IN_TWO_STEPS),
    "logprobs": case(words(8, 36), tokens=9, logprobs=2, seed=8, extra_args=IN_TWO_STEPS),
}
"""Canvases of 8, one or several, with a horizon behind all but the last."""

PLAIN: Final = {name: FIRST[name] for name in ("plain", "short", "top_p")}
ROUNDS: Final = {
    "all": [FIRST, SECOND, THIRD],
    "plain": [PLAIN],
    "options": [{name: one} for name, one in OPTIONS.items()],
    "sdar": [SDAR_FIRST, SECOND, THIRD],
    "llada": [LLADA],
}
