"""Requests as lm-evaluation-harness sends them: `local-completions` and `local-chat-completions`.

The payloads are those of its version 0.4.13 (`lm_eval/models/openai_completions.py`): prompts as
token ids in batches, temperature 0, seed 1234; a likelihood is read off the echo of the prompt.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from helpers.oracle import Oracle
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from vllm_diffusion.testing.server import Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("serves_on")]

QUESTIONS = [
    "Question: What is the sea?\nAnswer:",
    "Question: What is a hill, and why is it there?\nAnswer:",
    "Question: Who?\nAnswer:",
]


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def choices(http: httpx.Client, path: str, payload: dict[str, Any]) -> list[dict[str, Any]]:
    answer = http.post(f"/v1/{path}", json={"model": "tiny", **payload}).raise_for_status().json()
    return sorted(answer["choices"], key=itemgetter("index"))


# ---- generate_until ----


def generated(http: httpx.Client, prompts: list[list[int]], *until: str) -> list[str]:
    """What a task of type `generate_until` gets."""
    payload = {
        "prompt": prompts,
        "max_tokens": 48,
        "temperature": 0,
        "stop": list(until),
        "seed": 1234,
    }
    return [choice["text"] for choice in choices(http, "completions", payload)]


def test_generate_until_in_a_batch_alone_and_again(http: httpx.Client, tokenizer: Any) -> None:
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    # The harness adds the end of text to what the task names.
    batch = generated(http, prompts, "\n\n", "Question:", tokenizer.eos_token)
    assert len(batch) == len(set(batch)) == len(prompts)
    assert generated(http, prompts, "\n\n", "Question:", tokenizer.eos_token) == batch
    assert [
        text
        for prompt in prompts
        for text in generated(http, [prompt], "\n\n", "Question:", tokenizer.eos_token)
    ] == batch


def test_generate_until_ends_at_the_first_of_its_stops(http: httpx.Client, tokenizer: Any) -> None:
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    whole = generated(http, prompts, "Question:")
    until = [whole[0][4:7], whole[1][9:12]]
    for text, cut in zip(whole, generated(http, prompts, *until), strict=True):
        found = [text.index(stop) for stop in until if stop in text]
        assert cut == text[: min(found, default=len(text))]
    assert generated(http, prompts, *until) != whole


def test_generate_until_of_a_chat(http: httpx.Client) -> None:
    payload = {
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "max_tokens": 48,
        "temperature": 0,
        "stop": ["\n\n", "Question:", "</s>", "<|im_end|>"],
        "seed": 1234,
    }
    first, again = (choices(http, "chat/completions", payload) for _ in range(2))
    assert first[0]["message"]["content"]
    assert first[0]["message"]["content"] == again[0]["message"]["content"]


# ---- loglikelihood ----


def likelihoods(
    http: httpx.Client, prompts: list[list[int]], contexts: list[int]
) -> list[tuple[float, bool]]:
    """Sum of the log-probabilities behind the context, and whether each is the largest.

    The harness leaves out the last position, the one token that was written.
    """
    payload = {
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    found = []
    for choice, context in zip(choices(http, "completions", payload), contexts, strict=True):
        scores = choice["logprobs"]["token_logprobs"][context:-1]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][context:-1]]
        found.append((sum(scores), scores == best))
    return found


@torch.inference_mode()
def truth(oracle: Oracle, prompt: list[int]) -> Tensor:
    """[N, V] log-probabilities that Transformers' encoder gives for what follows each token."""
    logits = oracle.model.lm_head(oracle.encode(prompt).hidden)
    cap = oracle.model.config.get_text_config().final_logit_softcapping
    return (cap * torch.tanh(logits / cap)).log_softmax(-1)


def test_a_loglikelihood_is_that_of_transformers(
    http: httpx.Client, tokenizer: Any, tiny_checkpoint: Path
) -> None:
    oracle = Oracle(tiny_checkpoint)
    prompts, contexts, expected = [], [], []
    for question in QUESTIONS:
        context = tokenizer.encode(question)
        best = int(truth(oracle, context)[-1].argmax())
        for continuation in (tokenizer.encode(" water", add_special_tokens=False), [best]):
            prompt = context + continuation
            rows = truth(oracle, prompt)[len(context) - 1 : -1]
            prompts.append(prompt)
            contexts.append(len(context))
            expected.append(
                (
                    float(rows.gather(1, torch.tensor(continuation)[:, None]).sum()),
                    rows.argmax(1).tolist() == continuation,
                )
            )
    assert {greedy for _, greedy in expected} == {True, False}
    batch = likelihoods(http, prompts, contexts)
    for (score, greedy), (true_score, true_greedy) in zip(batch, expected, strict=True):
        assert score == pytest.approx(true_score, abs=1e-3)
        assert greedy == true_greedy
    for prompt, context, (score, greedy) in zip(prompts, contexts, batch, strict=True):
        ((alone, greedy_alone),) = likelihoods(http, [prompt], [context])
        assert alone == pytest.approx(score, abs=1e-4)
        assert greedy_alone == greedy


def test_an_echo_of_the_prompt_alone(http: httpx.Client, tokenizer: Any) -> None:
    prompts = [tokenizer.encode(question) for question in QUESTIONS]
    payload = {"prompt": prompts, "echo": True, "logprobs": 5, "max_tokens": 0, "temperature": 0}
    payload["return_tokens_as_token_ids"] = True  # the texts of two tokens may be the same
    for prompt, choice in zip(prompts, choices(http, "completions", payload), strict=True):
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(prompt)
        assert scores["token_logprobs"][0] is None
        assert all(score <= 0 for score in scores["token_logprobs"][1:])
        assert all(len(top) >= 5 for top in scores["top_logprobs"][1:])
