"""Constraints as clients ask for them: response formats, structured outputs, tool calls."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

import httpx
import pytest
from helpers.engines import SERVER_OPTIONS
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import token_id
from vllm_diffusion.testing.server import Server, serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.server, pytest.mark.slow]

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]
HASTY = {"vllm_xargs": {"diffusion_max_steps": 4}}
SUM = 'root ::= number ("+" number){1,3}\nnumber ::= [1-9] [0-9]{0,2}'


class Place(BaseModel):
    """What a client wants to be told."""

    name: str = Field(max_length=12)
    kind: Literal["sea", "lake", "river"]
    depth: int = Field(ge=0, le=11000)
    near: list[Literal["town", "wood"]] = Field(max_length=3)


class Visit(BaseModel):
    """Arguments of a tool."""

    where: str
    days: int | None
    how: Literal["by train", "on foot"]


VISIT = {
    "type": "function",
    "function": {
        "name": "visit",
        "parameters": Visit.model_json_schema(),
        "strict": True,
    },
}
ASK = {"type": "function", "function": {"name": "ask", "parameters": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "visit"}}


@pytest.fixture(scope="module")
def tooled(tiny_checkpoint: Path) -> Iterator[Server]:
    """A server of the random checkpoint, where nothing but a constraint makes an answer valid."""
    options = (
        "--enable-auto-tool-choice",
        "--tool-call-parser=gemma4",
        "--reasoning-parser=gemma4",
    )
    with serve(
        tiny_checkpoint, *SERVER_OPTIONS, *options, "--served-model-name", "tiny"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(tooled: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tooled.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def chat(client: OpenAI, *, stream: bool = False, **asked: Any) -> Any:
    """The one choice of an answer, or the deltas of a stream."""
    wanted = {"model": "tiny", "messages": MESSAGES, "max_tokens": 160, "seed": 5} | asked
    wanted["extra_body"] = HASTY | asked.get("extra_body", {})
    answer = client.chat.completions.create(**wanted, stream=stream)
    if not stream:
        return answer.choices[0]
    return [event.choices[0].delta for event in answer if event.choices]


def test_parse_gives_a_pydantic_model(client: OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="tiny",
            messages=MESSAGES,
            response_format=Place,
            max_tokens=160,
            seed=seed,
            extra_body=HASTY,
        )
        assert isinstance(answer.choices[0].message.parsed, Place)
        assert answer.choices[0].finish_reason == "stop"


def is_json_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def is_place(text: str) -> bool:
    return bool(Place.model_validate_json(text))


PLACE = {"name": "place", "schema": Place.model_json_schema(), "strict": True}
FORMATS: dict[str, tuple[dict[str, Any], Any]] = {
    "json_object": ({"response_format": {"type": "json_object"}}, is_json_object),
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": PLACE}},
        is_place,
    ),
    "json": ({"structured_outputs": {"json": Place.model_json_schema()}}, is_place),
    "regex": (
        {"structured_outputs": {"regex": r"[a-c]{2}-\d{3}"}},
        re.compile(r"[a-c]{2}-\d{3}").fullmatch,
    ),
    "choice": (
        {"structured_outputs": {"choice": ["north", "south"]}},
        {"north", "south"}.__contains__,
    ),
    "grammar": (
        {"structured_outputs": {"grammar": SUM}},
        re.compile(r"[1-9]\d{0,2}(\+[1-9]\d{0,2}){1,3}").fullmatch,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_has_the_form_that_was_asked_for_streamed_or_not(
    client: OpenAI, name: str
) -> None:
    body, is_valid = FORMATS[name]
    whole = chat(client, extra_body=body).message.content
    assert is_valid(whole), whole
    pieces = chat(client, extra_body=body, stream=True)
    assert "".join(delta.content or "" for delta in pieces) == whole


def test_completions_take_constraints_too(client: OpenAI) -> None:
    body = HASTY | {"structured_outputs": {"choice": ["north", "south"]}}
    answer = client.completions.create(
        model="tiny", prompt="go", max_tokens=32, seed=1, extra_body=body
    )
    assert answer.choices[0].text in {"north", "south"}


def test_several_prompts_and_several_answers_each_obey(client: OpenAI) -> None:
    body = HASTY | {"structured_outputs": {"regex": "[a-d]{3,5}"}}
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 32, "seed": 3, "n": 2}

    def texts(prompt: Any) -> list[str]:
        answer = client.completions.create(prompt=prompt, extra_body=body, **asked)
        return [choice.text for choice in answer.choices]

    together = texts(["go", "stop"])
    assert together == texts("go") + texts("stop")
    assert all(re.fullmatch("[a-d]{3,5}", text) for text in together)
    pieces = ["", "", "", ""]
    for event in client.completions.create(
        prompt=["go", "stop"], extra_body=body, stream=True, **asked
    ):
        for choice in event.choices:
            pieces[choice.index] += choice.text
    assert pieces == together


def test_responses_obey(client: OpenAI) -> None:
    form = {"type": "json_schema", "name": "place", "schema": Place.model_json_schema()}
    asked: dict[str, Any] = {"model": "tiny", "input": "Tell me about the sea."}
    asked |= {"max_output_tokens": 160, "extra_body": HASTY | {"seed": 5}}
    whole = client.responses.create(text={"format": form}, **asked)
    assert is_place(whole.output_text)
    events = client.responses.create(text={"format": form}, stream=True, **asked)
    deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    tools = [{"type": "function"} | VISIT["function"]]  # type: ignore[dict-item]
    (call,) = client.responses.create(
        tools=tools, tool_choice="required", parallel_tool_calls=False, **asked
    ).output
    assert call.type == "function_call"
    Visit.model_validate_json(call.arguments)
    form["schema"] = {"multipleOf": 1001}
    for stream in (False, True):
        with pytest.raises(BadRequestError, match="'multipleOf'"):
            client.responses.create(text={"format": form}, stream=stream, **asked)


def test_messages_obey(tooled: Server) -> None:
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 160} | HASTY
    form = {"type": "json_schema", "schema": Place.model_json_schema()}
    visit = {"name": "visit", "input_schema": Visit.model_json_schema()}

    def message(**more: Any) -> Any:
        return httpx.post(f"{tooled.url}/v1/messages", json=asked | more, timeout=60)

    (block,) = message(output_config={"format": form}).json()["content"]
    assert is_place(block["text"])
    choices: list[dict[str, str]] = [{"type": "any"}, {"type": "tool", "name": "visit"}]
    for choice in choices:
        answer = message(tools=[visit], tool_choice=choice).json()
        assert answer["stop_reason"] == "tool_use"
        for block in answer["content"]:
            assert Visit.model_validate(block["input"])
    form["schema"] = {"multipleOf": 1001}
    refused = message(output_config={"format": form})
    assert refused.status_code == 400
    assert "'multipleOf'" in refused.json()["error"]["message"]


def visits(calls: Any) -> list[Visit]:
    """The calls, checked."""
    for call in calls:
        assert call.function.name in {"visit", "ask"}
    return [
        Visit.model_validate_json(call.function.arguments)
        for call in calls
        if call.function.name == "visit"
    ]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_call_is_one(client: OpenAI, choice: Any) -> None:
    for seed in range(3):
        answer = chat(client, tools=[VISIT, ASK], tool_choice=choice, seed=seed)
        assert answer.message.tool_calls
        assert not answer.message.content
        found = visits(answer.message.tool_calls)
        assert choice == "required" or len(found) == 1


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_streamed_call_is_the_same_and_leaks_nothing(client: OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {"tools": [VISIT], "tool_choice": choice, "parallel_tool_calls": False}
    (call,) = chat(client, **asked).message.tool_calls
    deltas = chat(client, stream=True, **asked)
    assert not "".join(delta.content or "" for delta in deltas)
    pieces = [piece.function for delta in deltas for piece in delta.tool_calls or ()]
    assert "".join(piece.name or "" for piece in pieces) == "visit"
    arguments = "".join(piece.arguments or "" for piece in pieces)
    assert json.loads(arguments) == json.loads(call.function.arguments)


def test_a_strict_tool_may_be_left_out_and_is_never_called_wrongly(client: OpenAI) -> None:
    for seed in range(3):
        answer = chat(client, tools=[VISIT], tool_choice="auto", seed=seed)
        visits(answer.message.tool_calls or ())
        assert "<|tool_call>" not in (answer.message.content or "")


ROOMY = {"type": "array", "items": {"type": "string", "maxLength": 200}, "maxItems": 100}
"""Too large for an automaton."""


@pytest.mark.parametrize(
    "asked",
    [
        {"extra_body": {"structured_outputs": {"choice": ["north", "south"]}}},
        {"extra_body": {"structured_outputs": {"json": ROOMY}}},
        {"tools": [VISIT], "tool_choice": "required"},
        {"tools": [VISIT], "tool_choice": NAMED},
    ],
    ids=["choice", "parser", "required", "named"],
)
def test_thinking_before_a_constraint_is_told_apart_streamed_and_whole(
    client: OpenAI, asked: dict[str, Any]
) -> None:
    extra = {
        **asked.get("extra_body", {}),
        "chat_template_kwargs": {"enable_thinking": True},
        "return_token_ids": True,
    }
    begin = token_id("<|channel>")
    for seed in range(3):
        body = {**asked, "extra_body": extra, "max_tokens": 90, "seed": seed}
        whole = chat(client, **body)
        assert whole.token_ids[0] == begin
        assert whole.token_ids.count(begin) == 1
        message = whole.message
        deltas = chat(client, stream=True, **body)
        for name in ("content", "reasoning"):
            streamed = "".join(getattr(delta, name, None) or "" for delta in deltas)
            assert streamed == (getattr(message, name, None) or "")
        if "tools" in asked:
            assert visits(message.tool_calls)
            assert not message.content
        else:
            assert message.content.startswith(("north", "south", "["))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"structured_outputs": {"regex": "a{300}"}}, "the shortest text of the constraint"),
        ({"structured_outputs": {"regex": "(a"}}, "regular expression"),
        (
            {"structured_outputs": {"choice": ["a"]}, "bad_words": ["about the sea"]},
            "bad_words of several tokens",
        ),
        (
            {"structured_outputs": {"choice": ["a"]}, "vllm_xargs": {"diffusion_suffix": "b"}},
            "keep one",
        ),
        (
            {"structured_outputs": {"choice": ["a"]}, "use_beam_search": True, "n": 2},
            "use_beam_search and a constraint",
        ),
        (
            {"allowed_token_ids": [300], "use_beam_search": True, "n": 2},
            "use_beam_search and allowed_token_ids",
        ),
    ],
)
def test_a_clients_mistake_is_told_at_once(
    client: OpenAI,
    body: dict[str, Any],
    problem: str,
    stream: bool,
) -> None:
    with pytest.raises(BadRequestError, match=problem):
        chat(client, extra_body=body, stream=stream)
    assert chat(client, extra_body=FORMATS["choice"][0]).message.content in {"north", "south"}


def test_a_strict_tool_that_cannot_be_kept_is_refused(client: OpenAI) -> None:
    tool = json.loads(json.dumps(VISIT))
    tool["function"]["parameters"]["properties"]["where"]["pattern"] = "(?=a)b"
    with pytest.raises(
        BadRequestError, match=r"strict tool 'visit' cannot be kept: #/properties/where.*lookaround"
    ):
        chat(client, tools=[tool], tool_choice="required")
