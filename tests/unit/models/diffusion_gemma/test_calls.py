"""Calls in Gemma's form: which the grammar of some tools takes, token by token."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from helpers.cases import for_each

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary, vocabulary_of
from vllm_diffusion.constrain.automaton.walk import DEAD, Walk
from vllm_diffusion.constrain.grammar import GrammarCompiler, rules_of
from vllm_diffusion.constrain.language.calls import AskedCalls, Function
from vllm_diffusion.constrain.language.kinds import grammar_of
from vllm_diffusion.constrain.language.syntax import MARK
from vllm_diffusion.errors import ConstraintError
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import build_tokenizer, token_id
from vllm_diffusion.models.diffusion_gemma.tools.calls import CALL_TOKENS, call_grammar
from vllm_diffusion.testing.tool_lists import browser, code_host, file_system

if TYPE_CHECKING:
    from vllm_diffusion.constrain.automaton.record import TokenAutomaton

pytest.importorskip("xgrammar")

FORM = "vllm_diffusion.models.diffusion_gemma.tools.calls:call_grammar"
TOKENS = {name: token_id(token) for name, token in CALL_TOKENS.items()}
NODE = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["x"],
}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 8},
        "days": {"type": "integer", "description": "how many"},
        "unit": {"enum": ["c", "f", 7, None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        "node": {"$ref": "#/$defs/node"},
    },
    "required": ["city", "unit"],
    "$defs": {"node": NODE},
}


EXAMPLES = {
    49: '<|tool_call>call:push_files{branch:<|"|>main<|"|>,files:[{content:<|"|>a < b<|"|>,'
    'path:<|"|>x.py<|"|>}],message:<|"|>fix<|"|>,owner:<|"|>o<|"|>,repo:<|"|>r<|"|>}<tool_call|>',
    21: "<|tool_call>call:browser_resize{height:7.5,width:1e3}<tool_call|>"
    "<|tool_call>call:browser_close{}<tool_call|>",
    14: '<|tool_call>call:read_file{head:3,path:<|"|>/etc/hosts<|"|>}<tool_call|>',
}


@cache
def tokenizer() -> Any:
    return build_tokenizer(512)


@cache
def vocabulary() -> Vocabulary:
    from transformers import PreTrainedTokenizerFast

    return vocabulary_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer()), 512)


def asked(*functions: Function, required: bool = True, several: bool = True) -> AskedCalls:
    return AskedCalls(functions=functions, tokens=TOKENS, required=required, several=several)


def tag_of(*functions: Function, required: bool, several: bool) -> str:
    text = asked(*functions, required=required, several=several).as_text()
    return json.dumps({"type": "structural_tag", "format": {"type": "grammar", "grammar": text}})


def automaton_of(tag: str, room: int | None = None) -> TokenAutomaton:
    return compile_constraint(
        "structural_tag", tag, vocabulary=vocabulary(), end_ids=[1], room=room, tool_form=FORM
    )


def takes(
    text: str,
    *functions: Function,
    required: bool = True,
    several: bool = True,
    room: int = 1 << 12,
) -> bool:
    """Whether a complete answer of at most so many bytes is what the grammar says."""
    tag = tag_of(*functions, required=required, several=several)
    automaton = automaton_of(tag, room)
    ids = tokenizer().encode(text, add_special_tokens=False).ids
    state = Walk(automaton).through(automaton.start, ids)
    return state != DEAD and bool(automaton.accepting[state])


def tool(parameters: Any = WEATHER, *, name: str = "weather", strict: bool = True) -> Function:
    return Function(name=name, parameters=parameters, strict=strict)


def call(arguments: str, name: str = "weather") -> str:
    return f"<|tool_call>call:{name}{{{arguments}}}<tool_call|>".replace("'", '<|"|>')


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        ("city:'Paris',unit:'c'", True),
        ("city:'Paris',days:3,tags:[true,false],unit:7", True),
        ("city:'a|b',node:{next:{x:1.5},x:-2e3},unit:null", True),
        ("city:'Paris'", False),  # lacks one
        ("unit:'c',city:'Paris'", False),  # another order
        ("city:'Paris',unit:'k'", False),
        ("city:'',unit:'c'", False),
        ("city:'Paris, France',unit:'c'", False),
        ("city:Paris,unit:'c'", False),
        ("city:'Paris',days:3.5,unit:'c'", False),
        ("city:'Paris',tags:[],unit:'c'", False),
        ("city:'Paris',tags:[true,true,true],unit:'c'", False),
        ("city:'Paris',node:{},unit:'c'", False),
        ("city:'Paris',more:1,unit:'c'", False),
    ],
)
def test_arguments_follow_their_schema(arguments: str, taken: bool) -> None:
    assert takes(call(arguments), tool()) is taken


def test_a_string_cannot_spell_what_ends_it() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    for text in ("x < y", "<<b>>", "a<", "<"):
        assert takes(call(f"a:'{text}'"), tool(schema)), text
    for text in ("x <| y", "<<|"):
        assert not takes(call(f"a:'{text}'"), tool(schema)), text


def test_a_long_bound_is_no_bound_where_there_is_no_room_for_it() -> None:
    text = {"type": "string", "maxLength": 524288, "minLength": 1}
    schema = {"type": "object", "properties": {"a": text}, "required": ["a"]}
    for content in ("x", "| a || b |\n|-|", "a < b << c > d", "<b>" * 100):
        assert takes(call(f"a:'{content}'"), tool(schema), room=1000), content
    for content in ("", "<|", "a<|", "<<|"):
        assert not takes(call(f"a:'{content}'"), tool(schema), room=1000), content


def test_a_tool_without_a_schema_takes_anything_and_one_without_parameters_nothing() -> None:
    anything = tool(None, strict=False)
    assert takes(call("a:{b:[1,'x',null]},c_d:true"), anything)
    assert takes(call(""), anything)
    nothing = tool({"type": "object", "properties": {}})
    assert takes(call(""), nothing)
    assert not takes(call("a:1"), nothing)


def test_tools_of_equal_parameters_share_their_rules() -> None:
    several = [tool(name=f"tool{number}") for number in range(20)]
    grammars = [call_grammar(asked(*tools)) for tools in (several[:1], several)]
    assert grammars[0].rules.keys() == grammars[1].rules.keys()
    assert takes(call("city:'a',unit:'c'", "tool7"), *several)


@pytest.mark.parametrize(
    ("tools", "count"), [(code_host(), 49), (browser(), 21), (file_system(), 14)]
)
def test_usual_lists_of_tools_are_kept_by_an_automaton(
    tools: list[dict[str, Any]], count: int
) -> None:
    functions = [Function(**each, strict=False) for each in tools]
    assert len(functions) == count
    tag = tag_of(*functions, required=True, several=True)
    automaton = automaton_of(tag)
    assert automaton.depth is None
    walk = Walk(automaton)
    ids = tokenizer().encode(EXAMPLES[count], add_special_tokens=False).ids
    assert automaton.accepting[walk.through(automaton.start, ids)]


def test_calls_that_are_required_are_all_there_is() -> None:
    one, two = tool(None, name="one", strict=False), tool(None, name="two", strict=False)
    both = call("", "one") + call("", "two")
    assert takes(both, one, two)
    assert takes(call("", "two"), one, two)
    assert not takes(both, one, two, several=False)
    for text in ("", "text", "text" + both, both + "text", call("", "three")):
        assert not takes(text, one, two)


def test_calls_that_are_not_required_stand_in_text() -> None:
    one = tool(None, name="one", strict=False)
    mixed = f"text {call('', 'one')} more"
    for text in ("", "text", mixed, mixed * 2, "spelled call:one{}"):
        assert takes(text, one, required=False)
    assert not takes(mixed * 2, one, required=False, several=False)
    assert not takes(f"text {call('', 'other')}", one, required=False)


LOOKAHEAD = {"type": "string", "pattern": "(?=a)b"}
UNKEPT: list[tuple[dict[str, Any], str, str, str]] = [  # what of it, kept of a loose tool, and not
    (LOOKAHEAD, "#/properties/a: .*lookaround", "'b'", "1"),
    ({**LOOKAHEAD, "maxLength": 2}, "lookaround", "'bb'", "'bbb'"),
    ({"type": "string", "format": "regex"}, "format 'regex'", "'x'", "1"),
    ({"type": "number", "multipleOf": 0.3}, "'multipleOf'", "0.5", "'x'"),
    ({"type": "number", "minimum": 1e300}, "more digits than can be kept", "3.5", "'x'"),
    ({"type": "array", "uniqueItems": True, "minItems": 1}, "'uniqueItems'", "[1]", "[]"),
    ({"$ref": "#/$defs/gone"}, "'#/\\$defs/gone' leads nowhere", "1", "x"),
    ({"$ref": "http://other"}, "'http://other' leads", "1", "x"),
    ({"type": "object", "properties": {"b": LOOKAHEAD}}, "properties/b", "{b:'x'}", "{b:1}"),
    (
        {"type": "array", "uniqueItems": True, "items": {**LOOKAHEAD, "maxLength": 1}},
        "'uniqueItems'",
        "['b','b']",
        "['bb']",
    ),
]


@pytest.mark.parametrize(("property_", "problem", "kept", "refused"), UNKEPT)
def test_what_cannot_be_kept_is_named_of_a_strict_tool_and_dropped_of_another_one(
    property_: dict[str, Any], problem: str, kept: str, refused: str
) -> None:
    schema = {
        "type": "object",
        "properties": {"a": property_, "b": {"type": "integer"}},
        "required": ["a", "b"],
    }
    with pytest.raises(ConstraintError, match=f"strict tool 'weather'.*{problem}"):
        takes("", tool(schema))
    loose = tool(schema, strict=False)
    assert takes(call(f"a:{kept},b:3"), loose)
    for arguments in (f"a:{refused},b:3", f"a:{kept},b:'x'", f"a:{kept}"):
        assert not takes(call(arguments), loose), arguments


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strnig"},
        {"type": "string"},
        {"properties": {"a": {"minimum": "3"}}},
        {"properties": {"a": {"const": float("inf")}}},
        {"properties": {"a": False}, "required": ["a"]},
        {"properties": {"a": {"exclusiveMinimum": 3, "maximum": 3}}, "required": ["a"]},
    ],
)
def test_parameters_that_make_no_sense_are_refused_of_a_strict_tool_alone(
    schema: dict[str, Any],
) -> None:
    with pytest.raises(ConstraintError, match="strict tool 'weather'"):
        takes("", tool(schema))
    assert takes(call("a:1"), tool(schema, strict=False))


@for_each(name=["a:b", "a{", "[a]", " a", ",a", 'a"', "a<|"])
def test_a_parameter_that_a_call_cannot_name(name: str) -> None:
    schema = {"type": "object", "properties": {name: {}, "b": {"type": "integer"}}}
    with pytest.raises(ConstraintError, match=r"strict tool 'weather'.*cannot name a parameter"):
        takes("", tool(schema))
    assert takes(call("b:1"), tool(schema, strict=False))


def test_parameters_that_a_call_can_name() -> None:
    names = {"城市": {}, "first name": {}, "x-id": {}, "a.b": {}, "a,b": {}}
    schema = {"type": "object", "properties": names, "required": [*names]}
    assert takes(call("a,b:1,a.b:1,first name:1,x-id:1,城市:1"), tool(schema))


@pytest.mark.parametrize(
    ("property_", "kept", "refused"),
    [
        ({"type": "string", "pattern": "^a+$"}, ["'a'", "'aaa'"], ["''", "'b'", "'ab'"]),
        ({"type": "string", "pattern": "b"}, ["'b'", "'abc'", "'b<'"], ["'a'", "'b<|'"]),
        ({"type": "string", "pattern": "^<[a-z|]*>$"}, ["'<b>'", "'<b|>'"], ["'<|b>'", "'b'"]),
        ({"type": "string", "pattern": "^a+$", "maxLength": 2}, ["'a'", "'aa'"], ["'aaa'"]),
        ({"type": "integer", "multipleOf": 3}, ["0", "-12"], ["4", "1.5"]),
        ({"enum": ["a", 1, None, ["b", {"d": 2, "C": "x"}]]}, ["'a'", "['b',{C:'x',d:2}]"], ["b"]),
        ({"type": "string", "not": {"enum": ["a", "b"]}}, ["'c'", "'aa'"], ["'a'", "'b'", "1"]),
        ({"type": "string", "format": "date"}, ["'2024-02-29'"], ["'2023-02-29'", "'x'"]),
        ({"type": "string", "format": "colour"}, ["'red'"], ["3"]),
        ({"type": "integer", "minimum": 3, "maximum": 11}, ["3", "11"], ["2", "12", "4.5", "-4"]),
        ({"type": "integer", "exclusiveMinimum": 3}, ["4", "40"], ["3", "-4"]),
        ({"type": "number", "exclusiveMaximum": 0}, ["-0.5", "-3"], ["0", "1"]),
        ({"type": "integer", "multipleOf": 1, "minimum": 0}, ["0", "7"], ["-1"]),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            ["{}", "{b:1}", "{b:1,c_d:2}"],
            ["{b:'x'}", "{b}"],
        ),
        ({"type": "object", "additionalProperties": False}, ["{}"], ["{b:1}"]),
        (
            {"type": "array", "prefixItems": [{"type": "integer"}, {"const": "x"}], "minItems": 1},
            ["[1]", "[1,'x']"],
            ["[]", "['x']", "[1,2]", "[1,'x',3]"],
        ),
        (
            {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}},
            ["[]", "[1]", "[1,2,2]"],
            ["[2]", "[1,1]"],
        ),
        (
            {"type": "array", "items": {"enum": [1, "x", None]}, "uniqueItems": True},
            ["[]", "[null,'x']"],
            ["[1,1]"],
        ),
        (
            {"type": "array", "contains": {"const": 7}, "items": {"type": "integer"}},
            ["[7]", "[1,7,2]"],
            ["[]", "[1]"],
        ),
        (
            {
                "type": "object",
                "properties": {"n": {"type": "integer"}},
                "patternProperties": {"^x-": {"type": "boolean"}, "^城+$": {"type": "null"}},
                "additionalProperties": {"type": "string"},
                "maxProperties": 3,
            },
            ["{}", "{n:1,x-a:true}", "{z:'s'}", "{城城:null}", "{n:1,z:'s',x-a:true}"],
            [
                "{n:'s'}",
                "{x-a:'s'}",
                "{z:1}",
                "{城:1}",
                "{n:1,z:'s',x-a:true,y:'s'}",
                "{x-:b:true}",
            ],
        ),
        (
            {
                "type": "object",
                "properties": {"kind": {"enum": ["a", "b"]}, "v": {"type": "integer"}},
                "required": ["kind"],
                "if": {"properties": {"kind": {"const": "a"}}},
                "then": {"required": ["v"]},
            },
            ["{kind:'a',v:1}", "{kind:'b'}"],
            ["{kind:'a'}", "{}"],
        ),
        ({"anyOf": [{"type": "integer", "minimum": 5}, {"type": "null"}]}, ["5", "null"], ["4"]),
        ({"allOf": [{"type": "integer", "maximum": 5}], "default": 1}, ["5"], ["6"]),
    ],
)
def test_what_pydantic_says_of_a_value(
    property_: dict[str, Any], kept: list[str], refused: list[str]
) -> None:
    schema = {"type": "object", "properties": {"a": property_}, "required": ["a"]}
    for strict in (True, False):
        for value in kept:
            assert takes(call(f"a:{value}"), tool(schema, strict=strict)), value
        for value in refused:
            assert not takes(call(f"a:{value}"), tool(schema, strict=strict)), value


@pytest.mark.parametrize(
    ("property_", "kept", "refused"),
    [
        ({"type": "string", "maxLength": 5.0}, ["'abcde'"], ["'abcdef'"]),
        (
            {"type": "array", "items": {"type": "null"}, "maxItems": 1.0},
            ["[null]"],
            ["[null,null]"],
        ),
        ({"type": "string", "maxLength": 10**30}, ["'abc'"], ["1"]),
        (
            {
                "type": "number",
                "minimum": -1.7976931348623157e308,
                "maximum": 1.7976931348623157e308,
            },
            ["-1.5", "100000"],
            ["'a'"],
        ),
        ({"type": "number", "minimum": 5e-324}, ["0.5"], ["0", "-1"]),
        ({"type": "integer", "minimum": 0, "maximum": 1e300}, ["12"], ["-1"]),
        (
            {"type": "integer", "minimum": 0, "maximum": 2**256 - 1},
            [str(2**256 - 1)],
            [str(2**256)],
        ),
        ({"oneOf": [{"const": "a", "title": "A"}, {"const": 3}]}, ["'a'", "3"], ["'b'"]),
    ],
)
def test_bounds_as_other_languages_write_them(
    property_: dict[str, Any], kept: list[str], refused: list[str]
) -> None:
    test_what_pydantic_says_of_a_value(property_, kept, refused)


@pytest.mark.parametrize(
    ("property_", "problem"),
    [
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength 5 above maxLength 2"),
        ({"items": {"minItems": 5, "maxItems": 2.0}}, "#/properties/a/items has minItems 5 above"),
        ({"type": "number", "minimum": 3, "maximum": 2.5}, "minimum 3 above maximum 2.5"),
    ],
)
def test_bounds_that_contradict_are_named(property_: dict[str, Any], problem: str) -> None:
    schema = {"type": "object", "properties": {"a": property_}}
    for strict in (True, False):
        with pytest.raises(ConstraintError, match=f"tool 'weather' cannot be called.*{problem}"):
            takes("", tool(schema, strict=strict))


@pytest.mark.parametrize("property_", [{"enum": []}, False, {"prefixItems": [{}], "minItems": 2}])
def test_a_property_that_nothing_satisfies_is_left_out(property_: Any) -> None:
    schema = {"type": "object", "properties": {"a": property_, "b": {"type": "integer"}}}
    for strict in (True, False):
        assert takes(call("b:3"), tool(schema, strict=strict))
        assert not takes(call("a:1"), tool(schema, strict=strict))


@pytest.mark.parametrize(
    ("property_", "problem"),
    [
        ({"enum": ["\ud800"]}, "tool 'weather' cannot be called.*surrogate"),
        ({"type": "string", "minLength": 10**30}, "shortest text of the constraint has"),
    ],
)
def test_what_nobody_can_write_is_refused(property_: dict[str, Any], problem: str) -> None:
    schema = {"type": "object", "properties": {"a": property_}, "required": ["a"]}
    for strict in (True, False):
        with pytest.raises(ConstraintError, match=problem):
            takes("", tool(schema, strict=strict))


def test_parameters_that_nest_too_deep() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(300):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(ConstraintError, match=r"strict tool 'weather'.*nests too deep"):
        takes("", tool(schema))
    assert takes(call("b:1"), tool(schema, strict=False))


@pytest.mark.parametrize("required", [True, False])
def test_a_parser_takes_the_tokens_that_the_automaton_takes(required: bool) -> None:
    tools = [tool(), tool({"type": "object"}, name="open", strict=False)]
    tag = tag_of(*tools, required=required, several=True)
    automaton = automaton_of(tag)
    walk, read = Walk(automaton), vocabulary()
    parsers = GrammarCompiler([read.text(token) for token in range(len(read))], threads=1)
    rules = rules_of(
        "structural_tag", tag, grammar=grammar_of("structural_tag", tag, tool_form=FORM)
    )
    compiled = parsers.compile_rules(rules)
    rng, calls = random.Random(0), 0
    for _ in range(8):
        guard, state = parsers.guard(compiled, end_tokens=[1]), automaton.start
        for _ in range(60):
            legal = set(guard.legal().nonzero()[:, 0].tolist())
            taken = {token for token in range(len(read)) if walk.step(state, token) != DEAD}
            # It nests deeper than the automaton, and agrees where that has not ended.
            assert taken <= legal
            assert legal - taken <= {token for token in legal if read.text(token)[:1] in b"{["}
            special = [token for token in taken if read.text(token).startswith(MARK)]
            token = rng.choice(special if special and rng.random() < 0.5 else sorted(taken))
            assert guard.walk([token]) == 1
            state = walk.step(state, token)
            calls += token == TOKENS["end"]
            if state == automaton.end:
                assert guard.is_over()
                break
    assert calls > 2
