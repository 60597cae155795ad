"""Every sampling parameter through the `openai` package: all doors, streamed or not, in crowds."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from openai import AsyncOpenAI, BadRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from openai import OpenAI

    from vllm_diffusion.testing.server import Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("serves_on")]

LENGTH = 40
"""Two canvases: penalties look at what is committed."""

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """A way to ask for a text; the same for a blocking client and an asynchronous one."""

    create: Callable[[Any], Callable[..., Any]]
    request: dict[str, Any]
    text: Callable[[Any], str]
    piece: Callable[[Any], str]
    """The text in one event of a stream."""


DOORS = {
    "chat": Door(
        create=lambda client: client.chat.completions.create,
        request={"messages": MESSAGES, "max_completion_tokens": LENGTH},
        text=lambda answer: answer.choices[0].message.content,
        piece=lambda chunk: chunk.choices[0].delta.content or "",
    ),
    "completions": Door(
        create=lambda client: client.completions.create,
        request={"prompt": "the sea", "max_tokens": LENGTH},
        text=lambda answer: answer.choices[0].text,
        piece=lambda chunk: chunk.choices[0].text,
    ),
    "responses": Door(
        create=lambda client: client.responses.create,
        request={"input": "the sea", "max_output_tokens": LENGTH},
        text=lambda answer: answer.output_text,
        piece=lambda event: event.delta if event.type == "response.output_text.delta" else "",
    ),
}

# What the package does not know goes into extra_body.
EVERYWHERE: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 2},
    {"top_p": 0.4},
    {"extra_body": {"seed": 2}},
    {"extra_body": {"top_k": 3}},
    {"extra_body": {"min_p": 0.4}},
    {"extra_body": {"repetition_penalty": 1.8}},
    {"extra_body": {"presence_penalty": 2.0}},
    {"extra_body": {"frequency_penalty": 2.0}},
    {"extra_body": {"vllm_xargs": {"diffusion_max_steps": 3}}},
    {"extra_body": {"vllm_xargs": {"diffusion_t_min": 0.1, "diffusion_t_max": 0.5}}},
]
CHAT_AND_COMPLETIONS: list[dict[str, Any]] = [
    {"seed": 3},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.5},
    {"logit_bias": {"300": 100}},
    {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 1.0, "seed": 4},
    {"extra_body": {"allowed_token_ids": list(range(100, 140)), "bad_words": ["the"]}},
    {"extra_body": {"min_tokens": 5, "top_k": 9, "min_p": 0.01}},
]


def merged(door: Door, asked: dict[str, Any]) -> dict[str, Any]:
    """A whole request: seed 1, full length, few steps, unless it asks for something else."""
    body = {"ignore_eos": True} | ({} if "seed" in asked else {"seed": 1})
    body |= asked.get("extra_body", {})
    body["vllm_xargs"] = {"diffusion_max_steps": 20} | body.get("vllm_xargs", {})
    return {"model": "tiny"} | door.request | asked | {"extra_body": body}


def ask(client: OpenAI, door: Door, asked: dict[str, Any]) -> str:
    return door.text(door.create(client)(**merged(door, asked)))


async def ask_async(client: AsyncOpenAI, door: Door, asked: dict[str, Any], stream: bool) -> str:
    answer = await door.create(client)(**merged(door, asked), stream=stream)
    return "".join([door.piece(event) async for event in answer]) if stream else door.text(answer)


def together(
    server: Server, ask_one: Callable[[AsyncOpenAI, Any], Any], all_: Iterable[Any]
) -> Any:
    """The results of `ask_one` for all, asked at once with one asynchronous client."""

    async def run() -> list[Any]:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            return list(await asyncio.gather(*[ask_one(client, each) for each in all_]))

    return asyncio.run(run())


@pytest.mark.parametrize("name", DOORS)
def test_every_parameter_counts_and_the_seed_fixes_the_text(
    client: OpenAI, server: Server, name: str
) -> None:
    door = DOORS[name]
    settings = [{}, *EVERYWHERE, *(CHAT_AND_COMPLETIONS if name != "responses" else ())]
    # At 0 the argmax is kept; under this seed it may be what is drawn anyway.
    settings.append({"temperature": 0})
    alone = [ask(client, door, asked) for asked in settings]
    for asked, text in zip(settings[1:-1], alone[1:-1], strict=True):
        assert text != alone[0], f"{asked} changes nothing"
    for stream in (False, True):
        crowd = together(
            server,
            lambda client, asked, stream=stream: ask_async(client, door, asked, stream),
            settings,
        )
        for asked, text, expected in zip(settings, crowd, alone, strict=True):
            assert text == expected, f"{asked}, stream={stream}"


def test_log_probabilities_are_the_same_streamed_and_are_of_the_best_token(client: OpenAI) -> None:
    door = DOORS["chat"]
    request = merged(door, {"logprobs": True, "top_logprobs": 3, "temperature": 0.7})
    whole = client.chat.completions.create(**request).choices[0].logprobs.content
    chunks = client.chat.completions.create(**request, stream=True)
    streamed = [
        token
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert len(whole) == LENGTH
    assert streamed == whole
    for token in whole:
        assert len(token.top_logprobs) == 3
        # Nothing the request asks for moves the argmax here, and the argmax is what is committed.
        assert token.logprob == max(other.logprob for other in token.top_logprobs) <= 0


def test_completions_give_log_probabilities_token_by_token(client: OpenAI) -> None:
    door = DOORS["completions"]
    # By id: the texts of two tokens may be the same.
    asked = {"logprobs": 2, "extra_body": {"return_tokens_as_token_ids": True}}
    scored = client.completions.create(**merged(door, asked)).choices[0].logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == LENGTH
    for token, logprob, top in zip(
        scored.tokens, scored.token_logprobs, scored.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())


def test_n_choices_are_those_of_following_seeds_streamed_too(client: OpenAI) -> None:
    door = DOORS["chat"]
    several = merged(door, {"n": 3, "temperature": 0.7})
    whole = [each.message.content for each in client.chat.completions.create(**several).choices]
    assert whole == [
        ask(client, door, {"temperature": 0.7, "extra_body": {"seed": seed}}) for seed in (1, 2, 3)
    ]
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**several, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == whole


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_both_limits_cut_inside_a_canvas(client: OpenAI, limit: str) -> None:
    request = merged(DOORS["chat"], {})
    del request["max_completion_tokens"]
    answer = client.chat.completions.create(**request, **{limit: 7})
    assert answer.usage.completion_tokens == 7
    assert answer.choices[0].finish_reason == "length"


def test_temperature_0_needs_no_seed(client: OpenAI) -> None:
    door = DOORS["chat"]

    def without_seed(temperature: float) -> set[str]:
        asked = {"temperature": temperature, "extra_body": {"seed": None}}
        return {ask(client, door, asked) for _ in range(3)}

    assert len(without_seed(0)) == 1
    assert len(without_seed(1)) == 3


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"temperature": 2.5}, "temperature must be in [0, 2], got 2.5"),
    ("chat", {"temperature": 0, "n": 2}, "n must be 1 when using greedy sampling"),
    ("chat", {"top_p": 0}, "top_p must be in (0, 1], got 0"),
    ("chat", {"presence_penalty": -3}, "presence_penalty must be in [-2, 2], got -3"),
    ("chat", {"logprobs": True, "top_logprobs": 50}, "50"),
    ("chat", {"extra_body": {"min_p": 2}}, "min_p must be in [0, 1], got 2"),
    ("chat", {"extra_body": {"repetition_penalty": 0}}, "repetition_penalty must be greater"),
    (
        "chat",
        {"extra_body": {"vllm_xargs": {"diffusion_max_steps": 0, "diffusion_t_max": 0}}},
        "diffusion_max_steps must be a positive integer, got 0; diffusion_t_max must be",
    ),
    ("completions", {"logit_bias": {"900": 1}}, "900"),
    ("completions", {"extra_body": {"allowed_token_ids": []}}, "allowed_token_ids"),
    ("responses", {"temperature": 9}, "temperature must be in [0, 2], got 9"),
    ("responses", {"extra_body": {"vllm_xargs": {"diffusion_steps": 9}}}, "'diffusion_steps'"),
]


def test_what_is_wrong_is_an_error_of_the_package_that_says_so(
    client: OpenAI, server: Server
) -> None:
    for name, asked, said in WRONG:
        for stream in (False, True):
            with pytest.raises(BadRequestError) as caught:
                DOORS[name].create(client)(**merged(DOORS[name], asked), stream=stream)
            assert said in caught.value.body["message"], asked

    async def refused(client: AsyncOpenAI, wrong: tuple[str, dict[str, Any], str]) -> str:
        with pytest.raises(BadRequestError) as caught:
            await ask_async(client, DOORS[wrong[0]], wrong[1], stream=True)
        return str(caught.value)

    for (_, _, said), message in zip(WRONG, together(server, refused, WRONG), strict=True):
        assert said in message
