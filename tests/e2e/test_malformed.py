"""What no request can be gets status 400 and a name, on every route, and hurts nobody."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_diffusion.testing.server import Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("serves_on")]

HALF = "\ud800"
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "Tell me about the sea."}]
YES = {"structured_outputs": {"choice": ["yes"]}}

# What each route asks for at the least.
ROUTES: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": ASKED, "max_tokens": 8},
    "completions": {"prompt": "the sea", "max_tokens": 8},
    "responses": {"input": "the sea", "max_output_tokens": 8},
    "messages": {"messages": ASKED, "max_tokens": 8},
}
OPEN_AI = tuple(route for route in ROUTES if route != "messages")
CHAT = ("chat/completions", "messages")


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def called(arguments: str) -> list[dict[str, Any]]:
    """A conversation in which a tool has been called."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "tool", "tool_call_id": "a", "content": "x"}
    return [*ASKED, {"role": "assistant", "tool_calls": [call]}, answer]


def linked(url: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def tool(route: str, schema: Any, name: str = "f") -> dict[str, Any]:
    """A request's field with one tool, as the route writes it."""
    if route == "messages":
        return {"tools": [{"name": name, "input_schema": schema}]}
    if route == "responses":
        return {"tools": [{"type": "function", "name": name, "parameters": schema}]}
    return {"tools": [{"type": "function", "function": {"name": name, "parameters": schema}}]}


# (routes, body, what the message says)
MALFORMED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (OPEN_AI, {"stop": [HALF]}, "stop[0] holds half a surrogate pair"),
    (("messages",), {"stop_sequences": [HALF]}, "stop_sequences[0] holds half"),
    (CHAT, {"messages": [{"role": "user", "content": HALF}]}, "messages[0].content holds half"),
    (("completions",), {"prompt": HALF}, "prompt holds half"),
    (("chat/completions",), {"bad_words": ["a", HALF]}, "bad_words[1] holds half"),
    (("completions",), {"logit_bias": {HALF: 1}}, "logit_bias has a name with half"),
    (("chat/completions", "responses"), {"user": HALF}, "user holds half"),
    (("completions", "responses"), YES | {"stop_token_ids": [10**6]}, "stop_token_ids"),
    (("chat/completions",), YES | {"stop_token_ids": [2**63]}, "stop_token_ids"),
    (OPEN_AI, {"structured_outputs": 5}, "structured_outputs must be an object, got a number"),
    (OPEN_AI, {"structured_outputs": []}, "structured_outputs must be an object, got a list"),
    (tuple(ROUTES), {"kv_transfer_params": nested(900)}, "kv_transfer_params.a.a.a.a.a.a.a... n"),
    (tuple(ROUTES), {"vllm_xargs": {"kv_transfer_params": "a"}}, "vllm_xargs.kv_transfer_params"),
    (tuple(ROUTES), {"vllm_xargs": {"other": 2**64}}, "extra_args integers must be"),
    (tuple(ROUTES), {"top_k": 2**64}, "top_k holds an integer beyond 64 bits"),
    (
        ("chat/completions",),
        {"messages": called("[" * 20_000)},
        "arguments of a call in them",
    ),
    (("chat/completions",), {"messages": linked("file:///etc/hosts")}, "image_url"),
    (("chat/completions",), {"messages": linked("data:,")}, "image_url"),
    (("chat/completions",), {"messages": linked("http://localhost:1/a.png")}, "image_url"),
    (
        ("chat/completions", "completions"),
        {"use_beam_search": True, "length_penalty": -(2**64)},
        "length_penalty must be -50 to 50",
    ),
]


@pytest.fixture(scope="module")
def raw(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/v1/", timeout=60) as raw:
        yield raw


def post(raw: httpx.Client, route: str, body: dict[str, Any]) -> httpx.Response:
    # As ASCII: half a surrogate pair is written as an escape, which is the only way to send one.
    content = json.dumps({"model": "tiny"} | ROUTES[route] | body)
    return raw.post(route, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("routes", "body", "said"), MALFORMED, ids=[said[:40] for _, _, said in MALFORMED]
)
def test_it_is_refused_by_name(
    raw: httpx.Client, routes: tuple[str, ...], body: dict[str, Any], said: str
) -> None:
    for route in routes:
        for stream in (False, True):
            answer = post(raw, route, body | {"stream": stream})
            assert answer.status_code == 400, f"{route}, stream {stream}: {answer.text}"
            assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("route", ["chat/completions", "responses", "messages"])
def test_tools_that_nest_deep_are_refused(raw: httpx.Client, route: str) -> None:
    answer = post(raw, route, tool(route, nested(100)))
    assert answer.status_code == 400, answer.text
    assert "tools[0]." in answer.json()["error"]["message"]
    named = post(raw, route, tool(route, {}, name=HALF))
    assert named.status_code == 400, named.text
    assert "name holds half a surrogate pair" in named.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_what_is_no_request_at_all_is_refused(raw: httpx.Client, route: str) -> None:
    for text in ("[" * 1_000_000, '{"model": "tiny", "pro', "null", "", '"a"'):
        answer = raw.post(route, content=text, headers={"content-type": "application/json"})
        assert answer.status_code == 400, f"{text[:9]}: {answer.text}"


@pytest.mark.parametrize("top_k", [2**63, 2**64 - 1])
def test_any_number_of_ids_may_be_kept(raw: httpx.Client, top_k: int) -> None:
    body = {"seed": 1, "ignore_eos": True}
    all_of_them = post(raw, "completions", body).raise_for_status().json()["choices"]
    assert post(raw, "completions", body | {"top_k": top_k}).json()["choices"] == all_of_them


def test_a_schema_may_hold_integers_beyond_64_bits(raw: httpx.Client) -> None:
    schema = {"type": "integer", "minimum": 2**64, "maximum": 2**64 + 9}
    answer = post(
        raw,
        "completions",
        {"max_tokens": 60, "structured_outputs": {"json": schema}},
    )
    text = answer.raise_for_status().json()["choices"][0]["text"]
    assert 2**64 <= int(text) <= 2**64 + 9


def test_a_whole_surrogate_pair_is_a_letter(raw: httpx.Client) -> None:
    content = '{"model": "tiny", "prompt": "\\ud83d\\ude00", "max_tokens": 8}'
    answer = raw.post("completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
