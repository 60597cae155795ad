"""Two ranks write what one writes: sharded layers, a sharded embedding, the same noise on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.parity import SPEC, conditioned_checkpoint
from helpers.ranks import OPTIONS, answers

from vllm_diffusion.head.sample import TILE
from vllm_diffusion.models.diffusion_gemma.testing.adapters import write_adapter

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def together(checkpoint: Path, adapter: str = "") -> list[list[int]]:
    """The answers of two ranks."""
    # Without its own core a rank would wait for the other one's.
    cores = "|".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2])
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-m", "helpers.ranks", str(checkpoint), "2", adapter],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the ranks are processes of their own anyway
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # vLLM logs to the same stream, also after this line.
    line = next(line for line in result.stdout.splitlines() if line.startswith("[["))
    answer: list[list[int]] = json.loads(line)
    return answer


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
    assert together(checkpoint, adapter) == alone
    assert len({tuple(one) for one in alone}) == 6
