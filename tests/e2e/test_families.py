"""`vllm serve` on every family with a mask token: what its users meet first, a server a family.

Tokens are held to the family's dense loop, over HTTP as they are. What is true of any model of ours
is tested with DiffusionGemma, in `test_server.py` and its neighbours.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from helpers.engines import SERVER_OPTIONS
from helpers.idle import wait_until_idle

from vllm_diffusion.testing.families import part_of
from vllm_diffusion.testing.server import Server, serve

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.server, pytest.mark.slow]

PROMPT = [300, 17, 44, 301, 90, 21]
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
LENGTH = 75
SLOTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family, served."""

    name: str
    maker: Any
    """Its module `testing.checkpoint`."""
    block: int
    server: Server
    http: httpx.Client

    def post(self, route: str, **body: Any) -> httpx.Response:
        """Ask, whatever comes of it."""
        return self.http.post(f"/v1/{route}", json={"model": "tiny", **body})

    def complete(self, **body: Any) -> list[dict[str, Any]]:
        """The choices of a completion, greedy and of full length unless told otherwise."""
        asked = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
        answer = self.post("completions", **asked | {"return_token_ids": True} | body)
        choices: list[dict[str, Any]] = answer.raise_for_status().json()["choices"]
        return choices

    def canvases(self, length: int = LENGTH) -> list[int]:
        """The tokens of each canvas behind ``PROMPT``."""
        first = self.block - len(PROMPT) % self.block if self.name == "sdar" else self.block
        widths = [first]
        while sum(widths) < length:
            widths.append(min(self.block, length - sum(widths)))
        return widths

    def dense(self, length: int = LENGTH) -> list[int]:
        """What the family's definition says."""
        loop = part_of(self.name, "reference").answer
        model, mask = self.maker.build_model(self.maker.TinySpec()), self.maker.MASK_ID
        tokens: list[int] = loop(model, PROMPT, length, mask_id=mask, block=self.block).tokens
        return tokens


@pytest.fixture(scope="module", params=[("sdar", 4), ("llada", 32)], ids=lambda each: each[0])
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    name, block = request.param
    maker = part_of(name, "checkpoint")
    checkpoint = maker.make_tiny_checkpoint(tmp_path_factory.mktemp(name))
    with (
        serve(checkpoint, *SERVER_OPTIONS, "--served-model-name", "tiny") as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        yield Family(name=name, maker=maker, block=block, server=server, http=http)


def test_tokens_are_those_of_the_dense_loop(family: Family) -> None:
    (choice,) = family.complete()
    assert choice["token_ids"] == family.dense()
    assert choice["finish_reason"] == "length"


def test_a_stream_brings_block_after_block(family: Family) -> None:
    body = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    with family.http.stream(
        "POST",
        "/v1/completions",
        json={"model": "tiny", "stream": True, "return_token_ids": True, **body},
    ) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["token_ids"] for line in lines]
    # A server that lags behind its engine sends several at once, but none in part.
    ends = set(accumulate(len(piece) for piece in pieces))
    assert len(ends) > 1
    assert ends <= set(accumulate(family.canvases()))
    assert [token for piece in pieces for token in piece] == family.complete()[0]["token_ids"]


def test_chat_answers_by_its_seed(family: Family) -> None:
    def said(seed: int, **more: Any) -> list[str]:
        body = {"messages": MESSAGES, "max_tokens": 40, "temperature": 2, "ignore_eos": True}
        answer = family.post("chat/completions", seed=seed, **body, **more).raise_for_status()
        usage = answer.json()["usage"]
        assert usage["completion_tokens"] == 40 * more.get("n", 1)
        return [choice["message"]["content"] for choice in answer.json()["choices"]]

    first = said(1)
    assert said(1) == first
    assert said(2) != first
    several = said(1, n=3)
    assert several[:1] == first
    assert len(set(several)) == 3


def test_the_other_interfaces_answer(family: Family) -> None:
    body = {"max_output_tokens": 40, "seed": 1, "ignore_eos": True}
    answer = family.post("responses", input="the sea", **body).raise_for_status().json()
    assert answer["usage"]["output_tokens"] == 40
    answer = family.post("messages", messages=MESSAGES, max_tokens=40).raise_for_status().json()
    assert 0 < answer["usage"]["output_tokens"] <= 40


def test_it_stops_inside_a_block_and_at_its_end(family: Family) -> None:
    whole = family.complete()[0]
    tokens, text = whole["token_ids"], whole["text"]
    first = family.canvases()[0]
    for at in (0, first - 1, first, first + 1):
        (stopped,) = family.complete(stop_token_ids=[tokens[at]])
        assert stopped["token_ids"] == tokens[: tokens.index(tokens[at]) + 1]
        assert stopped["finish_reason"] == "stop"
    (stopped,) = family.complete(stop=[text[5:8]])
    assert stopped["text"] == text[: text.index(text[5:8])]
    for most in (1, first, first + 1):
        # Whole text: the length that is asked for is a part of what the model sees.
        assert family.complete(max_tokens=most)[0]["token_ids"] == family.dense(most)


def test_log_probabilities_are_told(family: Family) -> None:
    (choice,) = family.complete(logprobs=5, max_tokens=9)
    told = choice["logprobs"]
    assert len(told["token_logprobs"]) == 9
    assert all(value < 0 for value in told["token_logprobs"])
    # By their text, which several tokens of bytes share.
    assert all(0 < len(best) <= 6 for best in told["top_logprobs"])
    body = {"messages": MESSAGES, "max_tokens": 9, "ignore_eos": True, "seed": 1}
    answer = family.post("chat/completions", logprobs=True, top_logprobs=2, **body)
    content = answer.raise_for_status().json()["choices"][0]["logprobs"]["content"]
    assert [len(each["top_logprobs"]) for each in content] == [2] * 9


def test_what_may_be_said_is_obeyed(family: Family) -> None:
    mask = family.maker.MASK_ID
    (choice,) = family.complete(allowed_token_ids=[mask, 40, 41], temperature=1, seed=1)
    assert set(choice["token_ids"]) <= {40, 41}
    (choice,) = family.complete(logit_bias={str(mask): 100, "55": 99}, max_tokens=9)
    assert set(choice["token_ids"]) == {55}
    for wanted, pattern in (
        ({"regex": "[ab]{3,40}c"}, "[ab]{3,40}c"),
        ({"choice": ["the sea", "a hill"]}, "the sea|a hill"),
        ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}, r"\{.*\}"),
    ):
        for sampling in ({"temperature": 0}, {"temperature": 1, "seed": 2}):
            (choice,) = family.complete(structured_outputs=wanted, ignore_eos=False, **sampling)
            assert re.fullmatch(pattern, choice["text"].strip(), re.DOTALL), choice
            if "json" in wanted:
                json.loads(choice["text"])


def test_options_of_the_rule_are_obeyed_and_told(family: Family) -> None:
    xargs = {"diffusion_max_steps": 1, "diffusion_telemetry": True}
    (choice,) = family.complete(vllm_xargs=xargs)
    told = choice["diffusion"]
    assert [canvas["steps"] for canvas in told["canvases"]] == [1] * len(family.canvases())
    assert told["denoise_forwards"] == len(family.canvases())
    assert told["commit_forwards"] == 0
    presets = {
        preset: family.complete(vllm_xargs={"diffusion_preset": preset})[0]["token_ids"]
        for preset in ("reference", "balanced", "fast", "gentle")
    }
    assert presets["reference"] == family.complete()[0]["token_ids"]
    assert all(len(tokens) == LENGTH for tokens in presets.values())


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"echo": True, "logprobs": 1}, "prompt_logprobs is not supported by this model"),
    ({"vllm_xargs": {"diffusion_t_min": 0.1}}, "not of this model's decoding rule, reveal"),
    ({"vllm_xargs": {"diffusion_reveal_by": "luck"}}, "must be one of drawn, model, "),
    ({"vllm_xargs": {"diffusion_max_steps": 0}}, "must be a positive integer"),
    ({"vllm_xargs": {"diffusion_reveal_treshold": 0.5}}, "accepted: diffusion_preset, "),
    ({"thinking_token_budget": 3}, "thinking_token_budget=3"),
    ({"prompt": [300] * 600}, "maximum context length is 512"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_refused_by_name(family: Family, *, stream: bool) -> None:
    mask = {"allowed_token_ids": [family.maker.MASK_ID]}
    refused = [*REFUSED, (mask, "this model may say none")]
    if not stream:  # which vLLM itself refuses
        refused.append(({"prompt_logprobs": 1}, "prompt_logprobs is not supported by this model"))
    for body, said in refused:
        answer = family.post("completions", **{"prompt": PROMPT, "stream": stream, **body})
        assert answer.status_code == 400, answer.text
        assert said in answer.json()["error"]["message"]


def test_more_requests_than_slots_some_of_which_leave(family: Family) -> None:
    alone = family.complete(temperature=1, seed=7)[0]["token_ids"]

    def ask(number: int) -> list[int]:
        if number % 3:
            return list(family.complete(temperature=1, seed=7)[0]["token_ids"])
        body = {"prompt": PROMPT[number % 5 :], "max_tokens": 400, "ignore_eos": True}
        with family.http.stream(
            "POST", "/v1/completions", json={"model": "tiny", "stream": True, **body}
        ) as answer:
            next(answer.iter_lines())
        return []

    with ThreadPoolExecutor(3 * SLOTS) as pool:
        said = list(pool.map(ask, range(3 * SLOTS)))
    assert all(tokens in (alone, []) for tokens in said)
    wait_until_idle(family.server)
    assert family.complete(temperature=1, seed=7)[0]["token_ids"] == alone
