"""Two ranks write what one writes: sharded layers, a sharded embedding, the same noise on both."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from helpers.parity import SPEC, conditioned_checkpoint
from helpers.ranks import OPTIONS, answers, together

from vllm_diffusion.head.sample import TILE
from vllm_diffusion.models.diffusion_gemma.testing.adapters import write_adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
@pytest.mark.parametrize("vocab", [SPEC.vocab, 2 * TILE], ids=["half a tile", "a tile a rank"])
def test_two_ranks_write_the_same_tokens_as_one(
    engine: Callable[..., LLM], tmp_path: Path, vocab: int
) -> None:
    # Ranks that would cut a tile gather all logits, others exchange statistics alone.
    checkpoint = conditioned_checkpoint(tmp_path, replace(SPEC, vocab=vocab))
    alone = answers(engine(checkpoint, **OPTIONS))
    assert together(checkpoint) == alone
    assert [len(one) for one in alone] == [64] * 6
    assert len({tuple(one) for one in alone}) == 6


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores")
def test_two_ranks_write_the_same_with_an_adapter(
    engine: Callable[..., LLM], tmp_path: Path
) -> None:
    checkpoint = conditioned_checkpoint(tmp_path / "checkpoint")
    adapter = str(write_adapter(tmp_path / "adapter", checkpoint, alike=False))
    alone = answers(engine(checkpoint, enable_lora=True, **OPTIONS), adapter)
    assert together(checkpoint, adapter=adapter) == alone
    assert len({tuple(one) for one in alone}) == 6
