"""One request at a time against Transformers: cache, hidden states, logits, canvases, tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.doubt import decided_run
from helpers.oracle import Oracle
from helpers.parity import (
    ENGINE,
    PAGE,
    SPEC,
    assert_near,
    assert_parity,
    assert_same,
    conditioned_checkpoint,
    generate,
    make_prompt,
    scheduler_of,
)
from helpers.probe import Probe
from PIL import Image
from transformers import AutoProcessor
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSamplerConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from helpers.oracle import OracleRun
    from helpers.probe import ProbedRun
    from vllm import LLM

pytestmark = pytest.mark.vllm

WINDOW, CANVAS = SPEC.sliding_window, SPEC.canvas

# One token; the pages +-1; the window +-1; the first prompt whose canvas ends beyond the window
# (prompt + canvas > window) +-1; and one with several pages out of the window's sight.
LENGTHS = sorted(
    {1, 2}
    | {edge + d for edge in (WINDOW - CANVAS, PAGE, WINDOW, 2 * PAGE) for d in (-1, 0, 1)}
    | {150}
)


@pytest.fixture
def llm(engine: Callable[..., LLM], parity_checkpoint: Path) -> LLM:
    return engine(parity_checkpoint, **ENGINE)


def test_the_oracle_itself_is_not_at_the_mercy_of_rounding(
    parity_checkpoint: Path, oracle: Oracle
) -> None:
    exact = Oracle(parity_checkpoint, dtype=torch.float64)
    for length in (1, 49):
        prompt = make_prompt(length)
        seed, rounded = decided_run(oracle, prompt, length)
        truth = exact.generate(prompt, seed=seed)
        assert rounded.tokens == truth.tokens
        assert rounded.steps == truth.steps
        for ours, theirs in zip(rounded.canvases, truth.canvases, strict=True):
            for step, true_step in zip(ours.steps, theirs.steps, strict=True):
                assert_near(step.logits, true_step.logits.float(), "fp32 against fp64")
                assert_same(step.next_canvas, true_step.next_canvas, "canvas")


@pytest.mark.parametrize("length", LENGTHS)
def test_three_canvases(llm: LLM, oracle: Oracle, length: int) -> None:
    prompt = make_prompt(length)
    seed, theirs = decided_run(oracle, prompt, length)
    with Probe() as probe:
        (tokens,) = generate(llm, [prompt], [seed])
    assert_parity(probe.run(seed), theirs)
    assert tokens == theirs.tokens


@pytest.mark.parametrize("chunk", [PAGE, PAGE + 1, 40, 2 * PAGE, 100])
def test_a_prompt_prefilled_in_chunks(
    llm: LLM, oracle: Oracle, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step's token budget is what cuts prompts; it is read by every schedule().
    monkeypatch.setattr(scheduler_of(llm), "max_num_scheduled_tokens", chunk)
    prompt = make_prompt(150)
    seed, theirs = decided_run(oracle, prompt, chunk)
    with Probe() as probe:
        (tokens,) = generate(llm, [prompt], [seed])
    run = probe.run(seed)
    assert max(run.prompt_chunks) <= chunk
    assert len(run.prompt_chunks) == -(-150 // chunk), "the prompt was not cut as intended"
    assert_parity(run, theirs)
    assert tokens == theirs.tokens


def test_a_prompt_found_in_the_prefix_cache(llm: LLM, oracle: Oracle) -> None:
    prompt = make_prompt(150)
    generate(llm, [prompt], [1], max_tokens=CANVAS)
    seed, theirs = decided_run(oracle, prompt, 2)
    with Probe() as probe:
        (tokens,) = generate(llm, [prompt], [seed])
    run = probe.run(seed)
    cached = 150 - sum(run.prompt_chunks)
    assert cached >= PAGE, "nothing came from the cache"
    assert_parity(run, theirs, cached=cached)
    assert tokens == theirs.tokens


def test_the_next_turn_finds_committed_canvases_in_the_prefix_cache(
    llm: LLM, oracle: Oracle
) -> None:
    # The reference for a second turn is a plain prefill of the whole conversation, so this holds
    # only if what the commit forwards wrote is what a prefill of the same text writes.
    prompt = make_prompt(40)
    (answer,) = generate(llm, [prompt], [3])
    conversation = prompt + answer + make_prompt(20, variant=1)
    seed, theirs = decided_run(oracle, conversation, 4)
    with Probe() as probe:
        (tokens,) = generate(llm, [conversation], [seed])
    run = probe.run(seed)
    cached = len(conversation) - sum(run.prompt_chunks)
    assert cached > len(prompt) + CANVAS, "no committed canvas came from the cache"
    assert_parity(run, theirs, cached=cached)
    assert tokens == theirs.tokens


def test_commit_writes_what_a_prefill_of_the_same_text_writes(llm: LLM, oracle: Oracle) -> None:
    prompt = make_prompt(37)
    with Probe() as probe:
        (tokens,) = generate(llm, [prompt], [5])
    # The last canvas is not committed: nobody looks at it.
    text = prompt + tokens[: 2 * CANVAS]
    prefilled = oracle.encode(text)
    run = probe.run(5)
    assert sorted(run.hidden) == list(range(len(text)))
    for position in range(len(text)):
        assert_near(run.hidden[position], prefilled.hidden[position], f"hidden {position}")
    last = run.contexts[len(prompt) + 2 * CANVAS]
    full = len(prefilled.keys) - 1
    assert_near(last.keys[full], prefilled.keys[full][: last.length], "keys of the full layer")
    assert_near(
        last.values[full], prefilled.values[full][: last.length], "values of the full layer"
    )


def test_generation_ends_where_the_reference_ends(llm: LLM, oracle: Oracle) -> None:
    ended = 0
    for first_seed in range(8):
        prompt = make_prompt(10, variant=first_seed)
        seed, theirs = decided_run(oracle, prompt, first_seed, stop_at_end=True)
        (tokens,) = generate(llm, [prompt], [seed], ignore_eos=False)
        # Transformers pads behind the end token, vLLM leaves the padding out.
        padding = [oracle.model.generation_config.pad_token_id]
        assert tokens + padding * (len(theirs.tokens) - len(tokens)) == theirs.tokens
        ended += len(tokens) % CANVAS != 0
    assert ended >= 2, "no request met an end token inside a canvas: the test did not test"


@pytest.mark.parametrize("max_tokens", [1, CANVAS - 1, CANVAS + 1, 2 * CANVAS + 7])
def test_a_token_limit_inside_a_canvas_cuts_the_reference(
    llm: LLM, oracle: Oracle, max_tokens: int
) -> None:
    prompt = make_prompt(20)
    seed, theirs = decided_run(oracle, prompt, 6)
    (tokens,) = generate(llm, [prompt], [seed], max_tokens=max_tokens)
    assert tokens == theirs.tokens[:max_tokens]


def test_other_seeds_write_other_texts(llm: LLM) -> None:
    prompt = make_prompt(20)
    texts = generate(llm, [prompt] * 3, [1, 2, 3], max_tokens=CANVAS)
    assert len({tuple(text) for text in texts}) == 3


# ---- images ----


def picture(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def processor(parity_checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(parity_checkpoint)


def processed(processor: Any, text: str, images: list[Image.Image]) -> tuple[list[int], Any]:
    """Token ids with the placeholders expanded, and what the model reads beside them."""
    inputs = dict(
        processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    )
    del inputs["attention_mask"]
    return inputs.pop("input_ids")[0].tolist(), inputs


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("<bos><|image|>hello world", [(200, 100)]),
        ("<bos>the quick brown fox jumps over the lazy dog <|image|> hello", [(200, 100)]),
        ("<bos><|image|> hello <|image|> the lazy dog", [(1000, 30), (480, 48)]),
        ("<bos><|image|><|image|>", [(480, 48), (200, 100)]),
        ("<bos>the quick <|image|> brown fox", [(64, 64)]),
    ],
    ids=["first", "in-the-middle", "two", "side-by-side", "longer-than-the-window"],
)
def test_images_in_the_prompt(
    llm: LLM, oracle: Oracle, processor: Any, text: str, sizes: list[tuple[int, int]]
) -> None:
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    prompt, inputs = processed(processor, text, images)
    seed, theirs = decided_run(oracle, prompt, 7, inputs=inputs)
    run = generate_from_images(llm, text, images, seed, theirs)
    assert_parity(run, theirs)


@pytest.mark.parametrize("chunk", [80, 130])
def test_a_prompt_with_an_image_prefilled_in_chunks(
    llm: LLM, oracle: Oracle, processor: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_of(llm), "max_num_scheduled_tokens", chunk)
    text = "<bos>" + "the quick brown fox " * 9 + "<|image|>" + " jumps over the lazy dog" * 9
    images = [picture(200, 100, 3)]
    prompt, inputs = processed(processor, text, images)
    seed, theirs = decided_run(oracle, prompt, 8, canvases=1, inputs=inputs)
    run = generate_from_images(llm, text, images, seed, theirs)
    assert len(run.prompt_chunks) > 1, "the prompt was not cut"
    assert_parity(run, theirs)


def test_an_image_found_in_the_prefix_cache(llm: LLM, oracle: Oracle, processor: Any) -> None:
    text = "<bos><|image|>the quick brown fox jumps over the lazy dog"
    images = [picture(200, 100, 4)]
    prompt, inputs = processed(processor, text, images)
    other, _ = decided_run(oracle, prompt, 9, canvases=1, inputs=inputs)
    generate_from_images(llm, text, images, other, None)
    seed, theirs = decided_run(oracle, prompt, 10, canvases=2, inputs=inputs)
    run = generate_from_images(llm, text, images, seed, theirs)
    cached = len(prompt) - sum(run.prompt_chunks)
    assert cached >= PAGE, "nothing came from the cache"
    assert_parity(run, theirs, cached=cached)


def generate_from_images(
    llm: LLM, text: str, images: list[Image.Image], seed: int, theirs: OracleRun | None
) -> ProbedRun:
    """Run one request and compare what it is given and what it writes with the oracle's."""
    from vllm import SamplingParams

    canvases = len(theirs.canvases) if theirs else 1
    with Probe() as probe:
        (output,) = llm.generate(
            [{"prompt": text, "multi_modal_data": {"image": images}}],
            SamplingParams(seed=seed, max_tokens=canvases * CANVAS, ignore_eos=True),
            use_tqdm=False,
        )
    if theirs:
        assert output.prompt_token_ids == list(theirs.prompt)
        assert list(output.outputs[0].token_ids) == theirs.tokens
    return probe.run(seed)


def test_an_image_matters(oracle: Oracle, processor: Any) -> None:
    # Against the test above passing because the picture reached neither side.
    hidden = []
    for seed in (0, 1):
        prompt, inputs = processed(processor, "<bos><|image|>hello", [picture(96, 64, seed)])
        hidden.append(oracle.generate(prompt, seed=1, canvases=1, inputs=inputs).hidden)
    assert float((hidden[0] - hidden[1]).abs().max()) > 0.1


# ---- other constants ----


def test_the_constants_of_the_generation_config_are_the_rules(
    engine: Callable[..., LLM], parity_checkpoint: Path, oracle: Oracle
) -> None:
    # Every constant differs from the checkpoint's, so none can be built in.
    constants = {
        "max_denoising_steps": 13,
        "t_min": 0.3,
        "t_max": 0.7,
        "stability_threshold": 2,
        "confidence_threshold": 0.1,
    }
    sampler = {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.8}
    override = {**constants, "sampler_config": sampler}
    other = engine(parity_checkpoint, **ENGINE, override_generation_config=override)
    steps = []
    for length in (9, 70):
        prompt = make_prompt(length, variant=5)
        reference = {**constants, "sampler_config": EntropyBoundSamplerConfig(entropy_bound=0.8)}
        seed, theirs = decided_run(oracle, prompt, length, overrides=reference)
        with Probe() as probe:
            (tokens,) = generate(other, [prompt], [seed])
        assert_parity(probe.run(seed), theirs)
        assert tokens == theirs.tokens
        steps += theirs.steps
    assert len(set(steps)) > 1, "every canvas ran out of steps: the stop was not tested"


# ---- other sizes ----


def test_a_deeper_model_with_a_wider_canvas(
    engine: Callable[..., LLM], tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Two full layers, one of them in the middle; a canvas of two pages, wider than the window.
    spec = replace(
        SPEC,
        layers=7,
        hidden=96,
        canvas=64,
        vocab=700,
        experts=6,
        experts_per_token=3,
        full_kv_heads=2,
        sliding_window=40,
    )
    checkpoint = conditioned_checkpoint(tmp_path_factory.mktemp("deeper"), spec)
    reference = Oracle(checkpoint)
    llm = engine(checkpoint, **ENGINE)
    for length in (13, 100):
        prompt = make_prompt(length, vocab=spec.vocab)
        seed, theirs = decided_run(reference, prompt, length, canvases=2)
        with Probe() as probe:
            (tokens,) = generate(llm, [prompt], [seed], max_tokens=2 * spec.canvas)
        assert_parity(probe.run(seed), theirs, window=spec.sliding_window)
        assert tokens == theirs.tokens
