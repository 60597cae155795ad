"""Random parameters in random company: promises hold, the seed decides, and nothing leaks."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from helpers.inside import Inside
from helpers.parity import ENGINE, SPEC, make_prompt
from helpers.probe import Probe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm import LLM, CompletionOutput

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CANVAS, VOCAB, STOP = SPEC.canvas, 512, 500
IDS = st.integers(12, 60)
WORDS = ["a", "the", "no", "x y"]


def chosen(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the keys, each with a value of its strategy."""
    return st.fixed_dictionaries({}, optional=strategies)


SAMPLING = chosen(
    temperature=st.sampled_from([0.0, 0.2, 0.5, 1.0, 1.7, 2.0]),
    top_p=st.sampled_from([0.01, 0.3, 0.9, 1.0]),
    top_k=st.sampled_from([-1, 1, 2, 17, VOCAB]),
    min_p=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    presence_penalty=st.sampled_from([-2.0, 0.5, 2.0]),
    frequency_penalty=st.sampled_from([-2.0, 0.5, 2.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3, 20.0]),
    logit_bias=st.dictionaries(IDS, st.sampled_from([-100.0, -1.0, 3.0, 100.0]), max_size=4),
    allowed_token_ids=st.lists(IDS, min_size=1, max_size=12, unique=True),
    min_tokens=st.sampled_from([0, 3, CANVAS, CANVAS + 3]),
    bad_words=st.lists(st.sampled_from(WORDS), max_size=3),
    logprobs=st.integers(0, 4),
    max_tokens=st.sampled_from([CANVAS - 3, CANVAS, 2 * CANVAS - 1]),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
OPTIONS = chosen(
    max_steps=st.sampled_from([1, 2, 7]),
    t_min=st.sampled_from([0.0, 0.3]),
    t_max=st.sampled_from([0.5, 1.5]),
    entropy_bound=st.sampled_from([0.0, 0.5, 50.0]),
    confidence_threshold=st.sampled_from([0.0, 0.1, 10.0]),
    stability_threshold=st.sampled_from([0, 1]),
    pinned=st.lists(st.integers(0, CANVAS - 4), min_size=1, max_size=3, unique=True),
)
REQUEST = st.tuples(st.integers(1, 60), SAMPLING, OPTIONS)


def sampling_of(number: int, sampling: dict[str, Any], options: dict[str, Any]) -> SamplingParams:
    """A request that can be served: wishes that exclude each other are brought together."""
    sampling = {"max_tokens": CANVAS, "seed": number, "stop_token_ids": [STOP]} | sampling
    sampling["min_tokens"] = min(sampling.get("min_tokens", 0), sampling["max_tokens"])
    extra = {f"diffusion_{name}": value for name, value in options.items()}
    if options.get("pinned"):
        allowed = sampling.get("allowed_token_ids", [77, 78])
        extra["diffusion_seed_canvas"] = [allowed[at % len(allowed)] for at in range(CANVAS)]
    return SamplingParams(**sampling, extra_args=extra)


def assert_promises(asked: SamplingParams, answer: CompletionOutput, llm: LLM) -> None:
    tokens, extra = list(answer.token_ids), asked.extra_args or {}
    assert all(0 <= token < VOCAB for token in tokens)
    assert asked.min_tokens <= len(tokens) <= asked.max_tokens
    given_ids = {at: extra["diffusion_seed_canvas"][at] for at in extra.get("diffusion_pinned", ())}
    for at, token in given_ids.items():
        assert tokens[at] == token
    if asked.allowed_token_ids:
        assert set(tokens) <= set(asked.allowed_token_ids)
    if not asked.allowed_token_ids:
        tokenizer = llm.get_tokenizer()
        for word in asked.bad_words:
            ids = tokenizer.encode(word, add_special_tokens=False)
            held = [tokens[at : at + len(ids)] for at in range(len(tokens))]
            starts = [at for at, each in enumerate(held) if each == ids]
            assert all(at + len(ids) - 1 in given_ids for at in starts), word
    if asked.logprobs is not None:
        assert len(answer.logprobs) == len(tokens)
        for token, position in zip(tokens, answer.logprobs, strict=True):
            assert position[token].logprob <= 0
            assert asked.logprobs <= len(position) <= asked.logprobs + 1


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(requests=st.lists(REQUEST, min_size=1, max_size=6))
def test_promises_hold_in_any_company(
    engine: Callable[..., LLM], parity_checkpoint: Path, requests: list[Any]
) -> None:
    llm = engine(parity_checkpoint, **ENGINE)
    asked = [sampling_of(number, *each[1:]) for number, each in enumerate(requests)]
    prompts = [make_prompt(each[0], number) for number, each in enumerate(requests)]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
    )
    for sampling, output in zip(asked, outputs, strict=True):
        assert_promises(sampling, output.outputs[0], llm)
    Inside(llm).assert_idle()


def random_requests(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of every kind, the same in every run."""
    dice = random.Random(20)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.9},
        {"min_p": 0.05, "presence_penalty": 0.7, "repetition_penalty": 1.2},
        {"logit_bias": {30: 4.0, 40: -9.0}, "bad_words": WORDS, "logprobs": 2},
        {"allowed_token_ids": list(range(100, 160)), "frequency_penalty": 1.0},
        {"extra_args": {"diffusion_t_max": 0.6, "diffusion_entropy_bound": 0.5}},
        {
            "extra_args": {
                "diffusion_seed_canvas": list(range(50, 50 + CANVAS)),
                "diffusion_pinned": [0, 9],
            }
        },
    ]
    return (
        [make_prompt(dice.randint(1, 90), number) for number in range(count)],
        [
            SamplingParams(
                max_tokens=2 * CANVAS,
                ignore_eos=True,
                seed=dice.getrandbits(40),
                **kinds[number % 8],
            )
            for number in range(count)
        ],
    )


def test_a_seed_gives_the_same_answer_whoever_shares_the_batch(
    engine: Callable[..., LLM], parity_checkpoint: Path
) -> None:
    prompts, asked = random_requests(16)
    answers = {}
    for seqs in (1, 3, 16):
        llm = engine(parity_checkpoint, max_num_seqs=seqs, **ENGINE)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
        )
        answers[seqs] = [list(output.outputs[0].token_ids) for output in outputs]
    assert answers[1] == answers[3] == answers[16]
    assert all(one != other for one, other in pairwise(answers[1]))


def test_preemption_changes_no_answer_and_no_logprob(
    engine: Callable[..., LLM], parity_checkpoint: Path
) -> None:
    prompts, asked = random_requests(8)

    def answers(llm: LLM) -> list[tuple[list[int], Any]]:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False
        )
        return [
            (list(answer.token_ids), [sorted(each) for each in answer.logprobs or ()])
            for answer in (output.outputs[0] for output in outputs)
        ]

    expected = answers(engine(parity_checkpoint, **ENGINE))
    tight = engine(
        parity_checkpoint, **ENGINE | {"max_model_len": 224, "num_gpu_blocks_override": 40}
    )
    with Probe() as probe:
        preempted = answers(tight)
    assert probe.preemptions > 0, "the cache was large enough for all: nothing was preempted"
    assert preempted == expected
