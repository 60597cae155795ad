"""Options that Transformers has too, step by step against it, in one batch with plain requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from helpers.doubt import decided_run
from helpers.parity import ENGINE, WHOLE_CANVASES, assert_parity, make_prompt
from helpers.probe import Probe
from transformers import LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSamplerConfig,
)
from vllm import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.oracle import Oracle, OracleRun
    from vllm import LLM

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def options(**values: Any) -> dict[str, Any]:
    return {"extra_args": {f"diffusion_{name}": value for name, value in values.items()}}


# Ours, and the same in Transformers' terms. Powers of two, so that the temperature is the same
# number whether the schedule or its ends are scaled.
PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"temperature": 0.5}, {"t_min": 0.2, "t_max": 0.4}),
    (options(t_min=0.25, t_max=0.5), {"t_min": 0.25, "t_max": 0.5}),
    (
        options(entropy_bound=2.0, confidence_threshold=0.05, max_steps=20),
        {
            "sampler_config": EntropyBoundSamplerConfig(2.0),
            "confidence_threshold": 0.05,
            "max_denoising_steps": 20,
        },
    ),
    (options(stability_threshold=0), {"stability_threshold": 0}),
    # Masking to the best k commutes with the temperature, so it is one rule there and here.
    ({"top_k": 5}, {"logits_processor": LogitsProcessorList([TopKLogitsWarper(5)])}),
    ({"top_k": 60}, {"logits_processor": LogitsProcessorList([TopKLogitsWarper(60)])}),
]


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(parity_checkpoint, **ENGINE)


def truth(
    oracle: Oracle, prompt: list[int], seed: int, theirs: dict[str, Any]
) -> tuple[int, OracleRun]:
    """The run of Transformers, under a seed that leaves nothing to rounding where that is known."""
    if "logits_processor" in theirs:  # doubt is measured on logits that no processor has changed
        return seed, oracle.generate(prompt, seed=seed, overrides=theirs)
    return decided_run(oracle, prompt, seed, overrides=theirs)


def test_every_option_equals_transformers_in_a_mixed_batch(llm: LLM, oracle: Oracle) -> None:
    prompts = [make_prompt(10 + 9 * number, number) for number in range(len(PAIRS))]
    runs = [
        truth(oracle, prompt, 1 + number, theirs)
        for number, (prompt, (_, theirs)) in enumerate(zip(prompts, PAIRS, strict=True))
    ]
    with Probe() as probe:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [
                SamplingParams(**WHOLE_CANVASES, **ours, seed=seed)
                for (seed, _), (ours, _) in zip(runs, PAIRS, strict=True)
            ],
            use_tqdm=False,
        )
    steps = set()
    for (seed, expected), output, (ours, _) in zip(runs, outputs, PAIRS, strict=True):
        if "top_k" not in ours:
            # The probe records logits before the request's mask, Transformers' after it.
            assert_parity(probe.run(seed), expected)
        assert list(output.outputs[0].token_ids) == expected.tokens, ours
        assert [len(canvas) for canvas in probe.run(seed).canvases] == expected.steps
        steps.add(tuple(expected.steps))
    assert len(steps) == len(PAIRS), "two options took the same steps: one may do nothing"
