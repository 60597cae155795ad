"""`vllm serve` with the plugin in it, as clients meet it: doors, bad input, overload, leaving."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from openai import BadRequestError, NotFoundError
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from openai import OpenAI
    from openai.types.chat import ChatCompletion
    from vllm import LLM

    from vllm_diffusion.testing.server import Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.usefixtures("serves_on")]

CANVAS = 32
SLOTS = 8
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]


def chat(client: OpenAI, **options: Any) -> ChatCompletion:
    """A chat request of 70 tokens, whatever they are, unless told otherwise."""
    extra = {"ignore_eos": True} | options.pop("extra_body", {})
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 70, "seed": 1} | options
    answer: ChatCompletion = client.chat.completions.create(**request, extra_body=extra)
    return answer


def text_of(answer: ChatCompletion) -> str:
    text = answer.choices[0].message.content
    assert text
    return text


@pytest.fixture
def raw(server: Server) -> Iterator[httpx.Client]:
    """HTTP without a client library's idea of what a request may be."""
    with httpx.Client(base_url=server.url, timeout=60) as raw:
        yield raw


# ---- doors ----


def test_chat_says_why_it_ended_and_what_it_used(client: OpenAI):
    answer = chat(client)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 70
    assert answer.usage.prompt_tokens > 10
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 70
    assert text_of(chat(client)) == text_of(answer), "the seed does not fix the answer"
    assert text_of(chat(client, seed=2)) != text_of(answer)


def test_a_streamed_chat_adds_up_to_the_blocking_one(client: OpenAI):
    whole = chat(client)
    chunks: list[Any] = list(chat(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(delta.delta.content or "" for delta in deltas) == text_of(whole)
    assert deltas[-1].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    # One chunk a canvas, at the least.
    assert len([delta for delta in deltas if delta.delta.content]) >= 3


def test_chat_gives_what_the_offline_engine_gives(client: OpenAI, engine: Callable[..., LLM]):
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=70, seed=1, ignore_eos=True)
    offline = engine().chat(MESSAGES, sampling, use_tqdm=False)[0]
    answer = chat(client)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(offline.prompt_token_ids or ())
    assert text_of(answer) == offline.outputs[0].text


def test_n_answers_differ_and_come_again(client: OpenAI):
    first, again = ([choice.message.content for choice in chat(client, n=3).choices] for _ in "12")
    assert len(set(first)) == 3
    assert again == first
    assert first[0] == text_of(chat(client))


def test_sampling_parameters_reach_the_canvas(client: OpenAI):
    plain = text_of(chat(client))
    for options in ({"temperature": 0.2}, {"top_p": 0.3}, {"extra_body": {"top_k": 2}}):
        changed = text_of(chat(client, **options))
        assert changed != plain
        assert text_of(chat(client, **options)) == changed
    forced = chat(client, logit_bias={"300": 100}, logprobs=True, top_logprobs=2)
    assert forced.choices[0].logprobs is not None
    scored = forced.choices[0].logprobs.content or []
    assert len(scored) == 70
    assert len({each.token for each in scored}) == 1
    assert all(each.logprob < 0 and len(each.top_logprobs) == 2 for each in scored)


def test_an_echo_is_the_prompt_and_its_scores(client: OpenAI):
    answer = client.completions.create(
        model="tiny", prompt="the sea", echo=True, logprobs=1, max_tokens=3, seed=1
    )
    assert answer.choices[0].text.startswith("the sea")
    scored = answer.choices[0].logprobs
    assert scored is not None
    assert scored.token_logprobs is not None
    assert scored.token_logprobs[0] is None
    assert all(value <= 0 for value in scored.token_logprobs[1:])
    assert answer.usage is not None
    assert len(scored.token_logprobs) == answer.usage.prompt_tokens + 3


def test_pins_over_http(client: OpenAI):
    seed = [40 + at for at in range(CANVAS)]
    xargs = {"diffusion_seed_canvas": seed, "diffusion_pinned": [2, 30], "diffusion_read_only": 1}
    body = {"vllm_xargs": xargs, "return_token_ids": True}
    answer: Any = chat(client, extra_body=body)
    tokens = answer.choices[0].token_ids
    assert len(tokens) == CANVAS
    assert (tokens[2], tokens[30]) == (42, 70)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_cuts_both_kinds_of_answer_alike(client: OpenAI, *, stream: bool):
    whole = text_of(chat(client))
    stop = whole[20:24]
    answer: Any = chat(client, stop=[stop], stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer if chunk.choices]
        text = "".join(choice.delta.content or "" for choice in choices)
        reason = choices[-1].finish_reason
    else:
        text, reason = text_of(answer), answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_completions_take_several_prompts_and_stop_tokens(client: OpenAI):
    request: Any = {"model": "tiny", "prompt": ["the sea", "a hill"], "max_tokens": 50, "seed": 4}
    extra = {"ignore_eos": True, "return_token_ids": True}
    whole = client.completions.create(**request, extra_body=extra)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 100
    tokens = whole.choices[1].model_extra["token_ids"]  # type: ignore[index]
    at = next(i for i in range(5, 50) if tokens[i] not in tokens[:i])
    stopped = client.completions.create(
        **request | {"prompt": "a hill"}, extra_body=extra | {"stop_token_ids": [tokens[at]]}
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.choices[0].model_extra["token_ids"] == tokens[: at + 1]  # type: ignore[index]
    assert stopped.usage is not None
    assert stopped.usage.completion_tokens == at + 1


def test_messages_of_the_anthropic_api_blocking_and_streamed(raw: httpx.Client):
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40}
    # This interface has no seed, and a random model may begin with its end token.
    for _ in range(10):
        whole = raw.post("/v1/messages", json=request).raise_for_status().json()
        assert whole["stop_reason"] in {"max_tokens", "end_turn"}
        assert 0 < whole["usage"]["output_tokens"] <= 40
        streamed = raw.post("/v1/messages", json=request | {"stream": True}).raise_for_status()
        events = re.findall(r"^event: (\w+)$", streamed.text, re.MULTILINE)
        assert events[0] == "message_start"
        assert events[-1] == "message_stop"
        if whole["content"][0]["text"] and "content_block_delta" in events:
            return
    pytest.fail("no text in ten answers")


def test_responses_api(client: OpenAI):
    request: Any = {"model": "tiny", "input": "the sea", "max_output_tokens": 40}
    request["extra_body"] = {"seed": 2, "ignore_eos": True}
    answer = client.responses.create(**request)
    assert answer.output_text
    assert answer.usage is not None
    assert answer.usage.output_tokens == 40
    streamed = client.responses.create(**request, stream=True)
    text = "".join(event.delta for event in streamed if event.type == "response.output_text.delta")
    assert text == answer.output_text


def picture(colour: str, size: tuple[int, int] = (96, 64)) -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def with_picture(url: str) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}]


def test_an_image_is_seen_over_http_and_offline_alike(client: OpenAI, engine: Callable[..., LLM]):
    from vllm import SamplingParams

    red, blue = (chat(client, messages=with_picture(picture(name))) for name in ("red", "blue"))
    assert red.usage is not None
    assert red.usage.prompt_tokens > 30
    assert text_of(red) != text_of(blue)
    sampling = SamplingParams(max_tokens=70, seed=1, ignore_eos=True)
    offline = engine().chat(with_picture(picture("red")), sampling, use_tqdm=False)[0]
    assert offline.outputs[0].text == text_of(red)


def test_diffusion_options_reach_the_worker(client: OpenAI, server: Server):
    before = server.metrics()
    xargs = {"diffusion_preset": "gentle", "diffusion_max_steps": 3}
    chat(client, max_tokens=64, extra_body={"vllm_xargs": xargs})
    after = server.metrics()
    moved = {
        name: after[name] - before[name] for name in after if name.startswith("vllm:diffusion_num_")
    }
    # The commit shares a forward with the second canvas's first step, and that has none.
    assert moved["vllm:diffusion_num_denoising_steps"] == 6
    assert moved["vllm:diffusion_num_canvas_positions"] == 6 * CANVAS
    assert moved["vllm:diffusion_num_committed_tokens"] == 64


def test_the_benchmark_of_vllm_runs_against_it(server: Server, tiny_checkpoint: Path):
    program = Path(sys.executable).with_name("vllm")
    run = subprocess.run(
        [
            str(program), "bench", "serve", "--base-url", server.url,
            "--model", "tiny", "--tokenizer", str(tiny_checkpoint),
            "--dataset-name", "random", "--random-input-len", "20", "--random-output-len", "40",
            "--num-prompts", "6",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    printed = dict(re.findall(r"^([\w ()/]+):\s+([\d.]+)\s*$", run.stdout, re.MULTILINE))
    assert printed["Successful requests"] == "6"
    assert printed["Total generated tokens"] == "240"
    assert float(printed["Denoising steps per canvas"]) > 1


# ---- bad input ----

COMPLETION = {"model": "tiny", "prompt": "the sea"}
CHAT = {"model": "tiny", "messages": MESSAGES}


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("completions", {"prompt": ""}, "non-empty"),
        ("completions", {"prompt": []}, "at least one prompt"),
        ("completions", {"prompt": [300] * 600}, "maximum context length is 512"),
        ("completions", {"max_tokens": 0}, "at least 1"),
        ("completions", {"max_tokens": "many"}, "valid integer"),
        ("completions", {"temperature": "hot"}, "valid number"),
        ("completions", {"seed": 2**63}, "less than or equal"),
        ("completions", {"logprobs": 21}, "21"),
        ("completions", {"temperature": 3}, "temperature"),
        ("completions", {"allowed_token_ids": [600]}, "600"),
        ("completions", {"vllm_xargs": {"diffusion_max_steps": 2**63}}, "at most"),
        ("completions", {"vllm_xargs": {"diffusion_canvas_length": 33}}, "canvas of 32, got 33"),
        ("chat/completions", {"messages": []}, "empty conversation"),
        ("chat/completions", {"messages": "hello"}, "messages"),
        (
            "chat/completions",
            {"thinking_token_budget": 3, "vllm_xargs": {"diffusion_t_min": 9}},
            "thinking_token_budget=3 (leave them at their defaults); diffusion_t_max (0.8)",
        ),
        (
            "chat/completions",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"multipleOf": 1001}},
                }
            },
            "has 'multipleOf' 1001",
        ),
        ("chat/completions", {"logit_bias": {"600": 1.0}}, "600"),
        ("chat/completions", {"vllm_xargs": {"diffusion_stpes": 8}}, "'diffusion_stpes'"),
        ("chat/completions", {"vllm_xargs": {"diffusion_max_steps": "8"}}, "got '8'"),
        ("chat/completions", {"vllm_xargs": {"diffusion_max_steps": {"a": 1}}}, "vllm_xargs"),
        ("chat/completions", {"vllm_xargs": [1]}, "vllm_xargs"),
        ("chat/completions", {"vllm_xargs": {"diffusion_preset": "quick"}}, "one of reference, "),
        (
            "chat/completions",
            {"messages": with_picture("data:image/png;base64,AAAA")},
            "load image",
        ),
        ("messages", {"max_tokens": 5, "vllm_xargs": {"diffusion_t_min": 9}}, "t_min (9)"),
        ("responses", {"input": "hi", "vllm_xargs": {"diffusion_t_min": 9}}, "t_min (9)"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_served_is_the_clients_error(
    raw: httpx.Client, path: str, body: dict[str, Any], said: str, *, stream: bool
):
    request = (COMPLETION if path == "completions" else CHAT) | body | {"stream": stream}
    answer = raw.post(f"/v1/{path}", json=request)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["error"]["message"]


def test_what_vllm_finds_late_is_the_clients_error_where_nothing_is_streamed(raw: httpx.Client):
    answer = raw.post("/v1/completions", json=COMPLETION | {"prompt": [300, 99999]})
    assert answer.status_code == 400, answer.text
    assert "99999" in answer.json()["error"]["message"]


def test_a_body_that_is_no_json_is_the_clients_error(raw: httpx.Client):
    headers = {"content-type": "application/json"}
    answer = raw.post("/v1/chat/completions", content=b'{"model": ', headers=headers)
    assert answer.status_code == 400


def test_the_openai_client_raises_its_own_errors(client: OpenAI):
    with pytest.raises(BadRequestError, match=r"frequency_penalty must be in \[-2, 2\]"):
        chat(client, frequency_penalty=3.0)
    with pytest.raises(NotFoundError, match="does not exist"):
        chat(client, model="another")


def test_bad_requests_among_good_ones_disturb_nobody(client: OpenAI):
    def bad(number: int) -> str:
        with pytest.raises(BadRequestError) as caught:
            chat(client, seed=number, extra_body={"vllm_xargs": {"diffusion_t_min": 9}})
        return str(caught.value)

    alone = [text_of(chat(client, seed=seed)) for seed in range(4)]
    with ThreadPoolExecutor(12) as threads:
        refused = [threads.submit(bad, number) for number in range(8)]
        served = [threads.submit(chat, client, seed=seed) for seed in range(4)]
        assert all("diffusion_t_min (9)" in each.result() for each in refused)
        assert [text_of(each.result()) for each in served] == alone


# ---- crowds ----


def stream_text(client: OpenAI, seed: int) -> str:
    chunks: Any = chat(client, seed=seed, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_three_times_more_streams_than_slots_all_get_their_answer(client: OpenAI):
    with ThreadPoolExecutor(3 * SLOTS) as threads:
        together = list(threads.map(lambda seed: stream_text(client, seed), range(3 * SLOTS)))
    assert len(set(together)) == 3 * SLOTS
    for seed in (0, 11, 23):
        assert text_of(chat(client, seed=seed)) == together[seed]


# ---- leaving ----

LONG = CHAT | {
    "n": SLOTS,
    "max_tokens": 400,
    "ignore_eos": True,
    "seed": 9,
    # A server on a busy host may hear only after many seconds that a client has left: the answer
    # takes minutes, for no canvas ever settles.
    "vllm_xargs": {"diffusion_max_steps": 300, "diffusion_confidence_threshold": 0},
}
"""All slots for minutes, so that a request nobody waits for any more would be noticed."""


def assert_little_was_written(server: Server, before: dict[str, float]) -> None:
    """Wait until nothing has run for a second; the answer must be far from complete."""
    idle = 0
    while idle < 5:
        time.sleep(0.2)
        idle = 0 if server.metrics()["vllm:num_requests_running"] else idle + 1
    name = "vllm:generation_tokens"
    assert server.metrics()[name] - before[name] < SLOTS * 400 / 2


def test_a_client_that_leaves_in_mid_stream_frees_its_slots(raw: httpx.Client, server: Server):
    before = server.metrics()
    with raw.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert any(
            '"content":"' in line and '"content":""' not in line for line in answer.iter_lines()
        )
    assert_little_was_written(server, before)


def test_a_client_that_gives_up_waiting_frees_its_slots(raw: httpx.Client, server: Server):
    before = server.metrics()
    with pytest.raises(httpx.ReadTimeout):
        raw.post("/v1/chat/completions", json=LONG, timeout=0.3)
    assert_little_was_written(server, before)


def test_all_slots_left_at_once_serve_the_next_crowd(raw: httpx.Client, client: OpenAI):
    def leave(seed: int) -> None:
        request = LONG | {"n": 1, "stream": True, "seed": seed}
        with raw.stream("POST", "/v1/chat/completions", json=request) as answer:
            next(answer.iter_lines())

    alone = stream_text(client, 5)
    with ThreadPoolExecutor(SLOTS) as threads:
        list(threads.map(leave, range(SLOTS)))
        together = list(threads.map(lambda _: stream_text(client, 5), range(SLOTS)))
    assert set(together) == {alone}
