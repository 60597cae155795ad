"""The engine on a real GPU, in fp32: batches, chunks, caches, preemption, options.

What is compared is tokens, with Transformers' under the same noise, or with those of the same
request alone; nothing looks inside. CUDA graphs are a part of `benchmarks/device_parity.py`.
Triton rounds fp32 before it multiplies unless it is told not to.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from helpers.doubt import decided_run
from helpers.parity import ENGINE, SPEC, generate, make_prompt, scheduler_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from helpers.oracle import Oracle
    from vllm import LLM

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.slow]

CANVAS = SPEC.canvas
LENGTHS = (1, 49, 57, 150)  # of prompts, around the sliding window of 56 and beyond
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "top_p": {"top_p": 0.8},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    "logprobs": {"logprobs": 3},
    "preset": {"extra_args": {"diffusion_preset": "fast"}},
}


@pytest.fixture(scope="module", autouse=True)
def _whole_products() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_F32_DEFAULT", "ieee")
        yield


@pytest.fixture
def start(engine: Callable[..., LLM], parity_checkpoint: Path) -> Callable[..., LLM]:
    def start(**options: Any) -> LLM:
        # Other kernels of experts round fp32 in their own ways.
        exact = {"kernel_config": {"moe_backend": "triton"}}
        return engine(parity_checkpoint, **(ENGINE | exact | options))

    return start


@pytest.fixture(scope="module")
def truth(oracle: Oracle) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Prompts, seeds under which nothing hangs on rounding, and Transformers' tokens."""
    prompts = [make_prompt(length, variant=length) for length in LENGTHS]
    runs = [decided_run(oracle, prompt, 31 + at) for at, prompt in enumerate(prompts)]
    return prompts, [seed for seed, _ in runs], [run.tokens for _, run in runs]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_batch_writes_what_transformers_writes(start, truth, ahead):
    prompts, seeds, tokens = truth
    assert generate(start(async_scheduling=ahead), prompts, seeds) == tokens


def test_a_request_alone_writes_what_transformers_writes(start, truth):
    for prompt, seed, tokens in zip(*truth, strict=True):
        assert generate(start(), [prompt], [seed]) == [tokens]


def test_a_prompt_in_chunks_and_from_the_prefix_cache(start, truth, monkeypatch):
    prompts, seeds, tokens = truth
    llm = start()
    monkeypatch.setattr(scheduler_of(llm), "max_num_scheduled_tokens", 40)
    for _ in ("computed in chunks", "found in the cache"):
        assert generate(llm, prompts[-1:], seeds[-1:]) == tokens[-1:]


def test_requests_that_are_preempted(start, truth):
    # Blocks for about one and a half of them.
    llm = start(max_model_len=256, num_gpu_blocks_override=40)
    prompts, seeds, tokens = truth

    def preemptions() -> float:
        found = llm.get_metrics()
        return sum(metric.value for metric in found if metric.name == "vllm:num_preemptions")

    before = preemptions()
    assert generate(llm, prompts * 2, seeds * 2) == tokens * 2
    assert preemptions() > before, "all of them fitted"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_write_the_same_alone_and_in_a_batch(start, truth, options):
    prompts, seeds, _ = truth
    llm = start()
    together = generate(llm, prompts, seeds, **options)
    alone = [generate(llm, [p], [s], **options)[0] for p, s in zip(prompts, seeds, strict=True)]
    assert together == alone


def test_a_schema_is_obeyed_beside_requests_without_one(start, truth):
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    prompts, seeds, tokens = truth
    asked = [
        SamplingParams(max_tokens=3 * CANVAS, ignore_eos=True, seed=seeds[0]),
        SamplingParams(
            max_tokens=3 * CANVAS,
            seed=seeds[1],
            structured_outputs=StructuredOutputsParams(json=SCHEMA),
        ),
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts[:2]]
    plain, obeying = (out.outputs[0] for out in start().generate(inputs, asked, use_tqdm=False))
    assert list(plain.token_ids) == tokens[0]
    assert 0 <= json.loads(obeying.text)["n"] <= 99
