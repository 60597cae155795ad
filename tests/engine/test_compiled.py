"""Compiled layers, which `vllm serve` runs unless told otherwise, give the tokens of eager ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from vllm import SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import EngineFactory
    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS: dict[str, Any] = {"limit_mm_per_prompt": {"image": 0, "video": 0}}


def test_compiled_layers_give_the_tokens_of_eager_ones(
    engine: EngineFactory, parity_checkpoint: Path
) -> None:
    compiled = tokens(engine(parity_checkpoint, enforce_eager=False, **OPTIONS))
    assert compiled == tokens(engine(parity_checkpoint, **OPTIONS))


def tokens(llm: LLM) -> list[list[int]]:
    """Of prompts short and long, over several canvases, answered together."""
    prompts = [{"prompt_token_ids": [7 + n % 90 for n in range(length)]} for length in (3, 40, 150)]
    sampling = [SamplingParams(seed=n, max_tokens=70, ignore_eos=True) for n in range(len(prompts))]
    return [one.outputs[0].token_ids for one in llm.generate(prompts, sampling, use_tqdm=False)]
