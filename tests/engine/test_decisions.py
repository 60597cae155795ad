"""Label probabilities read from one canvas are those of Transformers' forward over that canvas.

What asks is vLLM's own code where this vLLM has it: its strategy for DiffusionGemma writes the
canvas and the options of a read. The canvas of several questions is laid out as vLLM 0.33 does it.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.parity import ENGINE, SPEC, make_prompt
from vllm import SamplingParams
from vllm.entrypoints.generate.structured_decisions.strategies import DiffusionGemmaCanvasStrategy

from vllm_diffusion.head.stream import StreamingHead

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from helpers.oracle import Oracle
    from torch import Tensor
    from vllm import LLM, RequestOutput
    from vllm.logprobs import LogprobsOnePosition

    from vllm_diffusion.records import TokenScores

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

END, PAD = 5, 0
LABELS = list(range(40, 66))
"""Token ids of 26 options."""

# One token, around a page, around the window, a canvas that ends behind it, several pages.
LENGTHS = (1, 31, 33, SPEC.sliding_window - 16, SPEC.sliding_window, 150)

BESIDE: list[dict[str, Any]] = [
    {"seed": 1},
    {"temperature": 0.0, "logprobs": 3},
    {"top_k": 5, "seed": 2, "logit_bias": {40: 5.0}},
    {"seed": 3, "extra_args": {"diffusion_canvas_length": 20}},
]


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def llm(engine: Callable[..., LLM], parity_checkpoint: Path, request: pytest.FixtureRequest) -> LLM:
    return engine(parity_checkpoint, async_scheduling=request.param, **ENGINE)


def read(prompt: Sequence[int], labels: Sequence[int]) -> SamplingParams:
    """As vLLM asks for one question."""
    strategy = object.__new__(DiffusionGemmaCanvasStrategy)
    strategy.width, strategy.end, strategy.pad = strategy.CANVAS_STEP, END, PAD
    strategy.vocab_size = SPEC.vocab
    return strategy._sampling_params(list(labels), list(prompt))


def joint_read(slots: int, width: int) -> tuple[SamplingParams, list[int]]:
    """As vLLM 0.33 asks for several questions, and where their labels stand."""
    rng = random.Random(slots)
    canvas: list[int] = []
    places = []
    for _ in range(slots):
        canvas += [rng.randrange(30, SPEC.vocab) for _ in range(3)]
        places.append(len(canvas))
        canvas += [rng.randrange(SPEC.vocab), 30]
    canvas += [END] + [PAD] * (width - len(canvas) - 1)
    assert len(canvas) == width
    options = {
        "diffusion_seed_canvas": canvas,
        "diffusion_canvas_length": width,
        "diffusion_max_steps": 1,
        "diffusion_read_only": True,
    }
    params = SamplingParams(max_tokens=places[-1] + 1, logprob_token_ids=LABELS, extra_args=options)
    return params, places


def ask(
    llm: LLM, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[RequestOutput]:
    return llm.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in prompts], list(params), use_tqdm=False
    )


def canvas_of(params: SamplingParams) -> list[int]:
    assert params.extra_args is not None
    return list(params.extra_args["diffusion_seed_canvas"])


@torch.no_grad()
def truth(oracle: Oracle, prompt: Sequence[int], params: SamplingParams) -> torch.Tensor:
    """[L, V] log-probabilities of Transformers, at temperature 1, over the canvas of a read."""
    logits = oracle.model(
        input_ids=torch.tensor([list(prompt)]),
        decoder_input_ids=torch.tensor([canvas_of(params)]),
    ).logits[0]
    return logits.double().log_softmax(-1)


def assert_read(position: LogprobsOnePosition, expected: torch.Tensor, labels: list[int]) -> None:
    """Label probabilities and their mass, as vLLM makes them from log-probabilities."""
    ours = torch.tensor([position[label].logprob for label in labels], dtype=torch.float64)
    theirs = expected[labels]
    assert ours.softmax(0).allclose(theirs.softmax(0), rtol=0, atol=1e-5)
    assert float(ours.exp().sum()) == pytest.approx(float(theirs.exp().sum()), rel=1e-4)
    assert 0 < float(ours.exp().sum()) <= 1


def values(output: RequestOutput) -> list[list[float]]:
    positions = output.outputs[0].logprobs
    assert positions is not None
    return [[position[label].logprob for label in LABELS] for position in positions]


def test_one_question_equals_transformers_alone_and_among_others(llm: LLM, oracle: Oracle) -> None:
    prompts = [make_prompt(length, length) for length in LENGTHS]
    params = [read(prompt, LABELS) for prompt in prompts]
    alone = [ask(llm, [prompt], [each])[0] for prompt, each in zip(prompts, params, strict=True)]
    for prompt, each, output in zip(prompts, params, alone, strict=True):
        expected = truth(oracle, prompt, each)
        answer = output.outputs[0]
        assert len(answer.token_ids) == len(answer.logprobs or ()) == 2
        assert list(answer.token_ids) == expected.argmax(-1)[:2].tolist()
        assert_read(answer.logprobs[0], expected[0], LABELS)

    # Where a canvas is committed by itself, its numbers wait for that.
    assert params[-1].extra_args is not None
    apart = params[-1].clone()
    apart.extra_args = params[-1].extra_args | {"diffusion_fused_commit": False}
    (late,) = ask(llm, prompts[-1:], [apart])
    assert values(late) == values(alone[-1])

    # Asked again, now with the prompt in the prefix cache; and among twenty others.
    again = [ask(llm, [prompt], [each])[0] for prompt, each in zip(prompts, params, strict=True)]
    other = [make_prompt(20 + number, 100 + number) for number in range(20)]
    beside = [
        SamplingParams(max_tokens=40, ignore_eos=True, **BESIDE[number % len(BESIDE)])
        if number % 2
        else read(prompt, LABELS[:2])
        for number, prompt in enumerate(other)
    ]
    among = ask(llm, [*other, *prompts], [*beside, *params])[len(other) :]
    for one, two, three in zip(alone, again, among, strict=True):
        assert torch.tensor(values(two)).allclose(torch.tensor(values(one)), rtol=0, atol=1e-5)
        assert torch.tensor(values(three)).allclose(torch.tensor(values(one)), rtol=0, atol=1e-5)


def test_questions_about_one_state_share_its_cache_in_the_step_that_writes_it(
    llm: LLM, oracle: Oracle
) -> None:
    state = make_prompt(150, 7)
    prompts = [state + make_prompt(5 + number, 200 + number) for number in range(6)]
    params = [read(prompt, LABELS) for prompt in prompts]
    outputs = ask(llm, prompts, params)
    assert all(output.num_cached_tokens >= 128 for output in outputs[1:])
    for prompt, each, output in zip(prompts, params, outputs, strict=True):
        assert_read(output.outputs[0].logprobs[0], truth(oracle, prompt, each)[0], LABELS)


@pytest.mark.parametrize(("slots", "width"), [(2, 16), (6, SPEC.canvas)])
def test_several_questions_on_one_canvas(llm: LLM, oracle: Oracle, slots: int, width: int) -> None:
    prompt = make_prompt(70, slots)
    params, places = joint_read(slots, width)
    (output,) = ask(llm, [prompt], [params])
    expected = truth(oracle, prompt, params)
    answer = output.outputs[0]
    assert len(answer.token_ids) == places[-1] + 1
    for place in places:
        assert answer.token_ids[place] == expected[place].argmax()
        assert_read(answer.logprobs[place], expected[place], LABELS)


def test_the_questions_of_a_step_are_scored_in_one_reading_of_the_vocabulary(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, tuple[int, ...] | None]] = []
    original = StreamingHead.scores

    def scores(self: StreamingHead, hidden: Tensor, tokens: Tensor, **how: Any) -> TokenScores:
        asked.append((len(hidden), how["ids"]))
        return original(self, hidden, tokens, **how)

    monkeypatch.setattr(StreamingHead, "scores", scores)
    prompts = [make_prompt(9, number) for number in range(6)]
    lists = [LABELS[:2], LABELS, LABELS[1::-1], LABELS[:2], list(range(100, 190)), LABELS]
    params = [read(prompt, labels) for prompt, labels in zip(prompts, lists, strict=True)]
    together = ask(llm, prompts, params)
    # A read lets two tokens leave; no more rows are scored than equal numbers need. Ids of one
    # request count as one reading while there are no more of them than one request may have.
    assert asked == [(24, (*LABELS, *range(100, 190)))]
    asked.clear()
    params[0] = read(prompts[0], list(range(200, 300)))
    split = ask(llm, prompts, params)
    assert [(rows, len(ids or ())) for rows, ids in asked] == [(16, 126), (8, 116)]
    asked.clear()
    for prompt, each, labels, one, two in zip(prompts, params, lists, together, split, strict=True):
        (alone,) = ask(llm, [prompt], [each])
        assert alone.outputs[0].logprobs == two.outputs[0].logprobs
        if each is not params[0]:
            assert set(labels) <= set(one.outputs[0].logprobs[0])
            assert one.outputs[0].logprobs == two.outputs[0].logprobs
