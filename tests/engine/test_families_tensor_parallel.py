"""Two ranks write what the dense loops say, where text is not causal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from helpers.ranks import together
from helpers.regimes import Asked, prompt_of

from vllm_diffusion.models.llada.testing import checkpoint as llada
from vllm_diffusion.models.llada.testing.reference import answer as answer_of_llada
from vllm_diffusion.models.sdar.testing import checkpoint as sdar
from vllm_diffusion.models.sdar.testing.reference import answer as answer_of_sdar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores"),
]

BLOCK = 8
FAMILIES = [
    pytest.param(
        sdar,
        answer_of_sdar,
        {"hf_overrides": {"block_size": BLOCK}, "block_size": 32},
        id="sdar",
    ),
    pytest.param(
        llada,
        answer_of_llada,
        {"diffusion_config": {"canvas_length": BLOCK}, "max_num_batched_tokens": 512},
        id="llada",
    ),
]


@pytest.mark.parametrize(("maker", "answer", "options"), FAMILIES)
def test_two_ranks_write_what_the_dense_loop_says(
    tmp_path: Path, maker: ModuleType, answer: Callable[..., Any], options: dict[str, Any]
) -> None:
    spec = maker.TinySpec()
    first = len(maker.SPECIAL_TOKENS)
    asked = [
        Asked(prompt_of(length, length, vocab=spec.vocab, special=first), most)
        for length, most in ((1, 19), (BLOCK, 9), (BLOCK + 1, 40), (45, 26))
    ]
    model = maker.build_model(spec)
    how = {"mask_id": maker.MASK_ID, "block": BLOCK, "max_steps": BLOCK}
    wanted = [answer(model, each.prompt, each.length, **how).tokens for each in asked]
    found = together(
        maker.make_tiny_checkpoint(tmp_path, spec),
        greedy=[(each.prompt, each.length) for each in asked],
        options=options,
    )
    assert found == wanted
