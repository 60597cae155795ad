"""What a served answer says of its canvases, and what `/metrics` counts of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_diffusion.testing.server import Server

pytestmark = [pytest.mark.server, pytest.mark.slow]

CANVAS = 32
TOKENS = 70
CANVASES = 3
PREFIX = "vllm:diffusion_"
ASKED = {"vllm_xargs": {"diffusion_telemetry": True}}
COMMON: dict[str, Any] = {"model": "tiny", "seed": 3, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Tell me about the sea."}], "max_tokens": TOKENS}
COMPLETION = {"prompt": "the sea", "max_tokens": TOKENS}


@pytest.fixture
def raw(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as raw:
        yield raw


def post(raw: httpx.Client, path: str, *bodies: dict[str, Any]) -> dict[str, Any]:
    body = COMMON.copy()
    for each in bodies:
        body |= each
    reply = raw.post(f"/v1/{path}", json=body)
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def streamed(raw: httpx.Client, path: str, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream; it must end as the protocol says."""
    body = COMMON | {"stream": True}
    for each in bodies:
        body |= each
    with raw.stream("POST", f"/v1/{path}", json=body) as reply:
        assert reply.status_code == 200
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line[:5] == "data:"]
    if path != "responses":
        assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def counted(raw: httpx.Client) -> dict[tuple[str, str], float]:
    """The metrics of canvases by name and reason or kind, buckets left out."""
    page = raw.get("/metrics").text
    samples = [
        sample
        for family in text_string_to_metric_families(page)
        if family.name.startswith(PREFIX)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    ]
    assert {sample.labels["model_name"] for sample in samples} == {"tiny"}
    assert {sample.labels["engine"] for sample in samples} == {"0"}
    return {
        (
            sample.name.removeprefix(PREFIX),
            sample.labels.get("reason", sample.labels.get("kind", "")),
        ): sample.value
        for sample in samples
    }


def check(told: dict[str, Any], tokens: int = TOKENS) -> None:
    canvases = told["canvases"]
    assert sum(canvas["tokens"] for canvas in canvases) in range(tokens, tokens + CANVAS)
    assert told["denoise_forwards"] == sum(canvas["steps"] for canvas in canvases)
    # Commits share a forward with the next canvas; the last one is not needed.
    assert told["commit_forwards"] == 0
    assert told["rows"] == CANVAS * (told["denoise_forwards"] + len(canvases) - 1)
    for canvas in canvases:
        assert canvas["stopped_by"] in {"settled", "steps"}
        assert 0 < canvas["steps"] <= 48
        assert canvas["stopped_by"] == "settled" or canvas["steps"] == 48
        assert canvas["entropy"] >= 0


@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)]
)
def test_every_choice_tells_its_own_streamed_or_not(
    raw: httpx.Client, path: str, body: dict[str, Any]
):
    before = counted(raw)
    answer = post(raw, path, body, ASKED, {"n": 2})
    told = {choice["index"]: choice["diffusion"] for choice in answer["choices"]}
    assert sorted(told) == [0, 1]
    for each in told.values():
        check(each)

    ended: dict[int, Any] = {}
    for chunk in streamed(
        raw, path, body, ASKED, {"n": 2, "stream_options": {"include_usage": True}}
    ):
        for choice in chunk["choices"]:
            assert ("diffusion" in choice) == bool(choice["finish_reason"])
            if choice["finish_reason"]:
                assert choice["index"] not in ended
                ended[choice["index"]] = choice["diffusion"]
    assert ended == told

    after = counted(raw)
    grown = {name: after[name] - before[name] for name in after}
    twice = [each for each in told.values() for _ in "12"]
    canvases = [canvas for each in twice for canvas in each["canvases"]]
    denoised = sum(each["denoise_forwards"] for each in twice)
    assert grown["forwards_total", "denoise"] == denoised
    assert grown["forwards_total", "commit"] == 0
    assert grown["denoise_steps_per_canvas_sum", ""] == denoised
    assert grown["denoise_steps_per_canvas_count", ""] == len(canvases)
    for reason in ("settled", "steps"):
        stopped = [canvas for canvas in canvases if canvas["stopped_by"] == reason]
        assert grown["canvases_total", reason] == len(stopped)
    assert grown["canvas_entropy_count", ""] == len(canvases)
    entropy = sum(canvas["entropy"] for canvas in canvases)
    assert grown["canvas_entropy_sum", ""] == pytest.approx(entropy)
    assert grown["tokens_per_forward_count", ""] == len(twice)
    rates = [TOKENS / (each["denoise_forwards"] + each["commit_forwards"]) for each in twice]
    assert grown["tokens_per_forward_sum", ""] == pytest.approx(sum(rates))


def test_choices_of_several_prompts_are_told_apart(raw: httpx.Client):
    body = {"prompt": ["the sea", "a tree stands"], "n": 2, "max_tokens": 40}
    alone = [
        choice["diffusion"]
        for prompt in body["prompt"]
        for choice in post(raw, "completions", ASKED, body, {"prompt": prompt})["choices"]
    ]
    assert len({json.dumps(each) for each in alone}) > 1, "all take the same: nothing to tell apart"
    together = post(raw, "completions", ASKED, body)["choices"]
    assert [choice["diffusion"] for choice in together] == alone
    ended = {
        choice["index"]: choice["diffusion"]
        for chunk in streamed(raw, "completions", ASKED, body)
        for choice in chunk["choices"]
        if choice["finish_reason"]
    }
    assert [ended[index] for index in range(4)] == alone


def test_a_stop_string_ends_the_telling_where_it_ends_the_answer(raw: httpx.Client):
    whole = post(raw, "completions", COMPLETION)["choices"][0]["text"]
    stop = whole[5:8]
    (choice,) = post(raw, "completions", COMPLETION, ASKED, {"stop": stop})["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == stop
    assert len(choice["diffusion"]["canvases"]) == 1
    assert choice["diffusion"]["denoise_forwards"] == choice["diffusion"]["canvases"][0]["steps"]


def test_responses_tell_it_too(raw: httpx.Client):
    body = {"input": "Tell me about the sea.", "max_output_tokens": TOKENS}
    told = post(raw, "responses", body, ASKED)["diffusion"]
    check(told)
    last = streamed(raw, "responses", body, ASKED)[-1]
    assert last["type"] in {"response.completed", "response.incomplete"}
    assert last["response"]["diffusion"] == told


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", CHAT),
        ("completions", COMPLETION),
        ("responses", {"input": "the sea", "max_output_tokens": TOKENS}),
    ],
)
def test_who_does_not_ask_is_not_told(raw: httpx.Client, path: str, body: dict[str, Any]):
    assert '"canvases"' not in json.dumps(post(raw, path, body))
    refused = {"vllm_xargs": {"diffusion_telemetry": 0}}
    assert '"canvases"' not in json.dumps(post(raw, path, body, refused))
    assert '"canvases"' not in json.dumps(streamed(raw, path, body))


def test_an_answer_that_is_not_yes_or_no_is_refused(raw: httpx.Client):
    body = COMMON | COMPLETION | {"vllm_xargs": {"diffusion_telemetry": "much"}}
    reply = raw.post("/v1/completions", json=body)
    assert reply.status_code == 400
    assert "diffusion_telemetry must be a boolean (or 0/1), got 'much'" in reply.text
