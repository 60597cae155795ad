"""Calls in Gemma's form, between vLLM's request for them and vLLM's parser of them."""

from __future__ import annotations

import json
from functools import cache
from pkgutil import resolve_name
from typing import Any

import pytest
import vllm.envs
from helpers.spelling import Walk

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.vocabulary import vocabulary_of
from vllm_diffusion.errors import ConstraintError
from vllm_diffusion.models.diffusion_gemma.patches import PATCHES
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import build_tokenizer
from vllm_diffusion.upstream import ledger

pytestmark = pytest.mark.vllm

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 6},
        "days": {"type": "integer"},
        "unit": {"enum": ["c", "f"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "where": {
            "type": "object",
            "properties": {"lat": {"type": "number"}, "at": {"type": ["string", "null"]}},
            "required": ["lat"],
        },
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}


@cache
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(512), eos_token="<eos>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(autouse=True)
def patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patches, taken back at the end."""
    for patch in PATCHES:
        for target, wrap in patch.wraps.items():
            place = ledger.place_of(target)
            changed = ledger.replacement(place.value, resolve_name(wrap))
            monkeypatch.setattr(place.owner, place.attribute, changed)


def tool(name: str = "weather", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA} | fields}


def adjusted(**fields: Any) -> tuple[Any, Any]:
    """A chat request as it goes to the engine, and the parser of its answer."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.parser.parser_manager import ParserManager

    parser_cls = ParserManager.get_parser(tool_parser_name="gemma4", enable_auto_tools=True)
    assert parser_cls is not None
    request = ChatCompletionRequest(
        model="tiny", messages=[{"role": "user", "content": "?"}], **fields
    )
    parser = parser_cls(tokenizer(), request.tools)
    return parser.adjust_request(request), parser


def automaton_of(request: Any) -> Any:
    return compile_constraint(
        "structural_tag",
        request.structured_outputs.structural_tag,
        vocabulary=vocabulary_of(tokenizer(), 512),
        end_ids=[1],
        tool_form="vllm_diffusion.models.diffusion_gemma.tools.calls:call_grammar",
    )


def parsed_in_one(parser: Any, request: Any, ids: list[int]) -> Any:
    text = tokenizer().decode(ids, skip_special_tokens=request.skip_special_tokens)
    return parser.parse(text, request, enable_auto_tools=True, model_output_token_ids=ids)


def parsed_in_canvases(parser: Any, request: Any, ids: list[int], canvas: int) -> tuple[Any, Any]:
    """Content, and name and arguments of every call, of what a stream sends canvas by canvas."""
    content, calls, before = "", [], ""
    for first in range(0, len(ids), canvas):
        behind = min(first + canvas, len(ids))
        text = tokenizer().decode(ids[:behind], skip_special_tokens=False)
        delta = parser.parse_delta(
            text[len(before) :], ids[first:behind], request, [300], finished=behind == len(ids)
        )
        before = text
        if delta is None:
            continue
        content += delta.content or ""
        for call in delta.tool_calls or ():
            if call.index == len(calls):
                calls.append(["", ""])
            calls[call.index][0] += call.function.name or ""
            calls[call.index][1] += call.function.arguments or ""
    return content, calls


NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("strict", [True, False])
def test_what_may_be_written_is_parsed_into_calls_of_the_tools(choice: Any, strict: bool) -> None:
    from jsonschema import validate

    tools = [tool(strict=strict), tool("other", parameters=None)]
    request, parser = adjusted(tools=tools, tool_choice=choice, parallel_tool_calls=False)
    assert request.skip_special_tokens is False
    walk = Walk(automaton_of(request), 1, vocabulary_of(tokenizer(), 512))
    names = set()
    for free in range(0, 60, 4):
        ids = walk.tokens(free)
        _, content, calls = parsed_in_one(parser, request, ids)
        assert not content
        (call,) = calls
        names.add(call.name)
        if call.name == "weather":
            validate(json.loads(call.arguments), SCHEMA)
    assert "weather" in names
    assert names <= ({"weather"} if choice is NAMED else {"weather", "other"})


@pytest.mark.parametrize("canvas", [1, 7, 32, 300])
def test_a_stream_of_canvases_gives_the_same_calls_and_leaks_nothing(canvas: int) -> None:
    text = (
        'Look: <|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3,tags:[true,false],'
        'unit:<|"|>c<|"|>,where:{at:<|"|>x<|"|>,lat:1.5}}<tool_call|>'
        '<|tool_call>call:weather{city:<|"|>Rome<|"|>,unit:<|"|>f<|"|>}<tool_call|>'
    )
    ids = tokenizer().encode(text, add_special_tokens=False)
    request, parser = adjusted(tools=[tool(strict=True)], tool_choice="auto")
    content, calls = parsed_in_canvases(parser, request, ids, canvas)
    assert content.strip() == "Look:"
    assert [name for name, _ in calls] == ["weather", "weather"]
    assert json.loads(calls[0][1]) == {
        "city": "Paris",
        "days": 3,
        "tags": [True, False],
        "unit": "c",
        "where": {"at": "x", "lat": 1.5},
    }
    assert json.loads(calls[1][1]) == {"city": "Rome", "unit": "f"}
    _, whole, at_once = parsed_in_one(adjusted(tools=[tool(strict=True)])[1], request, ids)
    assert (whole or "").strip() == "Look:"
    assert [call.name for call in at_once] == ["weather", "weather"]


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "next": {"$ref": "#/$defs/point"}},
    "required": ["x"],
}
TYPED: dict[str, dict[str, Any]] = {
    "reference": {"$ref": "#/$defs/point"},
    "optional reference": {"anyOf": [{"$ref": "#/$defs/point"}, {"type": "null"}]},
    "list of references": {"type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1},
    "constant": {"const": 3},
    "number by reference": {"$ref": "#/$defs/number"},
    "text by reference": {"$ref": "#/$defs/digit"},
    "constants": {"oneOf": [{"const": 1}, {"const": "1a"}, {"const": True}]},
    "texts that look like others": {"enum": ["1", "true", "null", "[1]", "{}"]},
    "dictionary": {"type": "object", "additionalProperties": {"type": "boolean"}},
    "pattern": {"type": "object", "patternProperties": {"^x[a-z]*$": {"type": "null"}}},
    "tuple": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "null"}]},
    "list of lists": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
}


@pytest.mark.parametrize("about", TYPED)
def test_arguments_come_in_the_types_of_the_whole_schema(about: str) -> None:
    from jsonschema import validate

    parameters = {
        "type": "object",
        "properties": {"a": TYPED[about], "z": {"type": "string", "pattern": "^[a-z]{0,2}$"}},
        "required": ["a", "z"],
        "additionalProperties": False,
        "$defs": {
            "point": POINT,
            "number": {"type": "number", "minimum": 1},
            "digit": {"type": "string", "pattern": "^[0-9]$"},
        },
    }
    offered = [tool(parameters=parameters, strict=True)]
    request, parser = adjusted(tools=offered, tool_choice=NAMED)
    walk = Walk(automaton_of(request), 1, vocabulary_of(tokenizer(), 512))
    for free in range(0, 48, 3):
        ids = walk.tokens(free)
        (call,) = parsed_in_one(parser, request, ids)[2]
        arguments = json.loads(call.arguments)
        validate(arguments, parameters)
        for canvas in (1, 5):
            streaming = adjusted(tools=offered, tool_choice=NAMED)[1]
            _, ((_, streamed),) = parsed_in_canvases(streaming, request, ids, canvas)
            assert json.loads(streamed) == arguments


def test_what_vllm_asks_for_without_being_forced() -> None:
    free, _ = adjusted(tools=[tool()], tool_choice="auto")
    assert free.structured_outputs is None
    strict, _ = adjusted(tools=[tool(strict=True)], tool_choice="auto")
    assert automaton_of(strict).distance[automaton_of(strict).start] == 0
    none, _ = adjusted(tools=[tool(strict=True)], tool_choice="none")
    assert none.structured_outputs is None


def test_a_strict_schema_that_cannot_be_kept_is_the_clients_mistake() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}
    offered = [tool(parameters=parameters, strict=True)]
    request, _ = adjusted(tools=offered, tool_choice="required")
    with pytest.raises(ConstraintError, match=r"strict tool 'weather' cannot be kept: #/prop.*/a"):
        automaton_of(request)


def test_parameters_nest_no_deeper_than_the_schema_of_a_response() -> None:
    from vllm.exceptions import VLLMValidationError

    parameters: dict[str, Any] = {"type": "integer"}
    for _ in range(40):
        parameters = {"type": "object", "properties": {"a": parameters}}
    with pytest.raises(VLLMValidationError, match=r"tool 'weather'.*nested too deeply"):
        adjusted(tools=[tool(parameters=parameters)], tool_choice="required")


def test_a_switch_of_vllm_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # An engine that ran before in this process has had the environment read once and for all.
    monkeypatch.setitem(vars(vllm.envs), "VLLM_ENFORCE_STRICT_TOOL_CALLING", False)
    request, _ = adjusted(tools=[tool()], tool_choice="required")
    assert request.structured_outputs is None
