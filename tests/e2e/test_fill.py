"""Templates, suffixes and drafts over HTTP: every door, streamed and not, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import pytest
from openai import BadRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai import OpenAI
    from openai.types import Completion

    from vllm_diffusion.testing.server import Server

pytestmark = [pytest.mark.server, pytest.mark.slow]

CANVAS = 32
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]
TEMPLATE = ["Name: ", 4, "\nCity: ", 6, " 7"]
XARGS = {"vllm_xargs": {"diffusion_template": TEMPLATE}}


def complete(client: OpenAI, **options: Any) -> Completion:
    request = {"model": "tiny", "prompt": "the sea", "max_tokens": 12, "seed": 3} | options
    answer: Completion = client.completions.create(**request)
    return answer


def assert_filled(text: str) -> None:
    assert text.startswith("Name: ")
    assert "\nCity: " in text
    assert text.endswith(" 7")


@pytest.fixture
def raw(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as raw:
        yield raw


def test_a_template_is_the_whole_answer_of_a_chat(client: OpenAI) -> None:
    request: Any = {"model": "tiny", "messages": MESSAGES, "seed": 3, "extra_body": XARGS}
    whole = client.chat.completions.create(**request, logprobs=True, n=2)
    texts = [choice.message.content or "" for choice in whole.choices]
    for choice, text in zip(whole.choices, texts, strict=True):
        assert_filled(text)
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None
    assert texts[0] != texts[1]
    assert whole.usage is not None
    scored = sum(
        len((choice.logprobs and choice.logprobs.content) or ()) for choice in whole.choices
    )
    assert whole.usage.completion_tokens == scored
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == texts[0]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_template_at_the_other_doors(client: OpenAI) -> None:
    assert_filled(complete(client, max_tokens=CANVAS, extra_body=XARGS).choices[0].text)
    answer = client.responses.create(model="tiny", input="the sea", extra_body=XARGS)
    assert_filled(answer.output_text)


def test_a_suffix_is_not_part_of_the_answer_and_decides_it(client: OpenAI) -> None:
    plain = complete(client).choices[0].text
    texts = [complete(client, suffix=suffix).choices[0].text for suffix in (" of rain", "\n1 2 3")]
    assert len({plain, *texts}) == 3
    whole = complete(client, suffix=" of rain")
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    chunks: Any = complete(client, suffix=" of rain", stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == texts[0]
    option = {"vllm_xargs": {"diffusion_suffix": " of rain"}}
    assert complete(client, extra_body=option).choices[0].text == texts[0]
    several = complete(client, prompt=["the sea", "a hill"], suffix=" of rain")
    assert several.choices[0].text == texts[0]
    assert several.choices[1].text != texts[0]


def test_an_empty_suffix_is_none(client: OpenAI) -> None:
    assert complete(client, suffix="").choices == complete(client).choices


def test_a_draft_and_its_noise(client: OpenAI) -> None:
    def drafted(**options: Any) -> str:
        request: Any = {"model": "tiny", "messages": MESSAGES, "seed": 3, "max_tokens": 40}
        extra = {"ignore_eos": True, "vllm_xargs": options}
        return str(
            client.chat.completions.create(**request, extra_body=extra).choices[0].message.content
        )

    plain = drafted(diffusion_max_steps=48)
    assert drafted(diffusion_draft="the sea", diffusion_noise_level=1) == plain
    assert drafted(diffusion_draft="the sea") == drafted(
        diffusion_draft="the sea", diffusion_noise_level=0.5
    )
    assert drafted(diffusion_draft="the sea", diffusion_noise_level=0.1) != plain


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("completions", {"suffix": "a", "max_tokens": 32}, "max_tokens is 32, the canvas has 32"),
        ("completions", {"suffix": "a", "echo": True}, "suffix excludes echo"),
        ("completions", {"suffix": "a", "vllm_xargs": {"diffusion_suffix": "a"}}, "keep one"),
        ("completions", {"vllm_xargs": {"diffusion_template": [9]}, "max_tokens": 5}, "needs 10"),
        ("chat/completions", {"vllm_xargs": {"diffusion_template": [99]}}, "needs 100 tokens"),
        ("chat/completions", {"vllm_xargs": {"diffusion_template": ["<eos>", 1]}}, "end an answer"),
        ("chat/completions", {"vllm_xargs": {"diffusion_template": "ab"}}, "a list of texts"),
        ("chat/completions", {"vllm_xargs": {"diffusion_admitted": 1}}, "unknown option"),
        ("responses", {"input": "a", "vllm_xargs": {"diffusion_template": [99]}}, "needs 100"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit_is_the_clients_error(
    raw: httpx.Client, path: str, body: dict[str, Any], said: str, *, stream: bool
) -> None:
    start = {"prompt": "the sea"} if path == "completions" else {"messages": MESSAGES}
    answer = raw.post(f"/v1/{path}", json={"model": "tiny", "stream": stream} | start | body)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_beams_have_no_suffix(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="suffix excludes use_beam_search"):
        complete(client, suffix="a", n=2, extra_body={"use_beam_search": True})
