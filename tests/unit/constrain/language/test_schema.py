"""Soundness: what a schema's automaton accepts is valid; and known valid texts are accepted."""

import json
import re
from typing import Any

import numpy as np
import pytest
from helpers.cases import for_each
from helpers.schemas import TABLE, J, N, S, arr, obj, string
from helpers.spelling import END, VOCABULARY, Walk, accepts, after, spelled
from jsonschema import Draft202012Validator

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.schema import json_schema
from vllm_diffusion.constrain.language.written import written
from vllm_diffusion.errors import ConstraintError


def compiled(schema, **options):
    return compile_constraint(
        "json",
        json.dumps(schema),
        vocabulary=VOCABULARY,
        end_ids=[END],
        **options,
    )


@for_each(name=TABLE)
def test_what_is_accepted_is_valid(name):
    schema, valid, invalid = TABLE[name]
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    assert all(map(validator.is_valid, valid))
    assert not any(map(validator.is_valid, invalid)) or "format" in str(schema)
    walk = Walk(compiled(schema), seed=0)
    for free in (0, 1, 2, 4, 8, 16, 32, 64) * 6:
        text = walk.text(free)
        assert list(validator.iter_errors(json.loads(text))) == [], text


SPACINGS = (
    {},
    {"indent": 2},
    {"indent": 4},
    {"separators": (",", ":")},
    {"separators": (",\n", ":")},
)
DEEP = re.compile(r"\n {9}")
"""An indentation that may stand nowhere where the depth is not known."""


@for_each(name=TABLE)
def test_known_texts(name):
    schema, valid, invalid = TABLE[name]
    automaton = compiled(schema)
    rng = np.random.default_rng(0)
    for instance in valid:
        for spacing in SPACINGS:
            text = json.dumps(instance, ensure_ascii=False, **spacing)
            if DEEP.search(text):
                continue
            for _ in range(3):
                assert accepts(automaton, spelled(text, rng)), text
    for instance in invalid:
        text = json.dumps(instance, ensure_ascii=False)
        assert not accepts(automaton, spelled(text, rng)), text


SIMPLE = [schema for schema, _, _ in TABLE.values() if "$ref" not in str(schema)]


def combined(rng):
    """A schema made of others; many make no sense together."""
    one, two, three = (SIMPLE[i] for i in rng.integers(len(SIMPLE), size=3))
    kinds = [
        {"allOf": [one, two]},
        {"anyOf": [one, two]},
        {"oneOf": [one, two]},
        {"allOf": [one], "anyOf": [two, three]},
        arr({"anyOf": [one, two]}, maxItems=3, prefixItems=[three]),
        obj({"a": one, "b": {"allOf": [two, three]}}, ["b"]),
        obj({"a": one}, ["c"], additionalProperties=two),
        {**(one if isinstance(one, dict) else {}), **(two if isinstance(two, dict) else {})},
        {"allOf": [obj({"a": one, "b": two}, ["a"]), obj({"b": three}, ["c"])]},
    ]
    return kinds[rng.integers(len(kinds))]


@for_each(seed=range(120))
def test_combinations_are_followed_exactly_or_refused(seed):
    schema = combined(np.random.default_rng(seed))
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    try:
        walk = Walk(compiled(schema), seed)
    except ConstraintError:
        return
    for free in (0, 1, 2, 4, 8, 16, 32):
        text = walk.text(free)
        assert list(validator.iter_errors(json.loads(text))) == [], text


def test_without_white_space():
    automaton = compiled(obj({"a": arr(J), "b": S}), any_whitespace=False)
    walk = Walk(automaton, seed=1)
    for free in range(40):
        text = walk.text(free)
        dense = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
        assert text == dense


WORD = {"enum": ["a", "b"]}


def test_white_space_is_a_pretty_printer_s():
    schema = arr(obj({"a": WORD, "b": arr(WORD, maxItems=2)}, ["a", "b"]), maxItems=2)
    automaton = compiled(schema)
    rng = np.random.default_rng(0)
    value = [{"a": "b", "b": ["a", "a"]}, {"a": "a", "b": []}]
    for spacing in ({}, {"indent": 2}, {"indent": 4}, {"indent": "\t"}, {"separators": (",", ":")}):
        assert accepts(automaton, spelled(json.dumps(value, **spacing), rng))
    for text in ("[ {", "[\n  {", "[\n\t{", '[{"a": ', '[{\n        "a"'):
        assert after(automaton, spelled(text, rng)) is not None, text
    for text in (
        *(f'[{{"a": "a",{blanks}' for blanks in ("  ", "\n\n", "\n         ", "\n \t", "\t")),
        "[   ",
        " ",
        '[{"a" ',
        '[{"a":  ',
        '[{"a":\n',
    ):
        assert after(automaton, spelled(text, rng)) is None, text


def test_where_all_is_bounded_no_text_goes_on_for_ever():
    schema = {
        "type": "array",
        "maxItems": 3,
        "items": obj({"a": WORD, "b": {"$ref": "#/$defs/b"}}, ["a"]),
        "$defs": {"b": arr(WORD, maxItems=2)},
    }
    automaton = compiled(schema)
    onward = np.zeros(automaton.num_states, dtype=bool)
    onward[automaton.start] = True
    for _ in range(automaton.num_states):
        reached = np.zeros_like(onward)
        reached[automaton.target[onward[automaton.source]]] = True
        onward = reached
    assert not onward.any()


def test_nested_references_are_indented_as_deep_as_they_stand():
    leaf = obj({"a": WORD}, ["a"])
    schema = {
        "$defs": {"leaf": leaf},
        **obj({"x": {"$ref": "#/$defs/leaf"}, "y": arr({"$ref": "#/$defs/leaf"})}),
    }
    automaton = compiled(schema)
    rng = np.random.default_rng(0)
    text = json.dumps({"x": {"a": "b"}, "y": [{"a": "a"}]}, indent=4)
    assert accepts(automaton, spelled(text, rng))
    assert after(automaton, spelled('{"x": {\n         ', rng)) is None


def test_white_space_by_a_pattern():
    automaton = compiled(obj({"a": arr(WORD)}, ["a"]), whitespace_pattern=r"[\s]{0,2}|x")
    rng = np.random.default_rng(0)
    for text in ('{"a":["a"]}', '{ \n"a"\t\t: [\r"a"  ,"b"] }'):
        assert accepts(automaton, spelled(text, rng))
    for text in ("{   ", "{x", "{\x0b"):
        assert after(automaton, spelled(text, rng)) is None
    dense = compiled(arr(WORD), whitespace_pattern="x", any_whitespace=False)
    assert after(dense, spelled("[ ", rng)) is None


@for_each(
    text=[r'"\u0061"', r'"\/"', '"\n"', '"\x00"', r'"\ud83d\ude00"', r'"\ud800"', '"', r'"\x"']
)
def test_a_string_has_one_spelling(text):
    assert not accepts(compiled(S), spelled(text, np.random.default_rng(0)))


def test_a_number_close_to_an_exclusive_bound_is_not_read_as_the_bound():
    automaton = compiled({**N, "exclusiveMinimum": 0.1})
    rng = np.random.default_rng(0)
    assert float("0.10000000000000000001") == 0.1
    assert not accepts(automaton, spelled("0.10000000000000000001", rng))


REFUSED = {
    "not": (
        {"not": {"multipleOf": 3}},
        ["# has 'not', and what 'multipleOf' excludes cannot be said"],
    ),
    "unique": (arr(J, uniqueItems=True), ["# has 'uniqueItems' of items"]),
    "contains": (arr(prefixItems=[J], contains=J), ["# has 'contains' beside prefixItems"]),
    "multiple": (obj({"a": {**N, "multipleOf": 0.01}}), ["#/properties/a: has 'multipleOf'"]),
    "format": (arr(string(format="regex")), ["#/items: has the format 'regex'"]),
    "together": (
        string(pattern="^(ab|cd)*$", maxLength=3000),
        ["'pattern' and 'maxLength' together: what is asked of a text together needs too many"],
    ),
    "lookahead": (string(pattern="(?=a)b"), ["lookaround"]),
    "bounds too large": ({**N, "minimum": 1e300}, ["#: the bound 1.000e+300 has more digits"]),
    "bounds too small": ({**N, "exclusiveMinimum": 0, "maximum": 1e-310}, ["very many digits"]),
    "bad pattern": (string(pattern=r"\p{L}"), ["is not a 'regex'"]),
    "remote": ({"$ref": "https://a.b/c"}, ["leads outside"]),
    "dangling": ({"$ref": "#/$defs/x"}, ["leads nowhere"]),
    "closing parts": (
        {
            "allOf": [
                obj({"a": J}, additionalProperties=False),
                {"type": "object", "patternProperties": {"b": J}},
            ]
        },
        ["one of which closes an object"],
    ),
    "patterns": (
        {"type": "object", "patternProperties": dict.fromkeys("abcd", J)},
        ["more than 3 'patternProperties'"],
    ),
    "names twice": (obj({}, minProperties=2, additionalProperties=J), ["'minProperties' beside"]),
    "different": ({"allOf": [arr(J, contains=S), arr(J, contains=N)]}, ["different 'contains'"]),
    "combinations": (
        {"allOf": [{"anyOf": [{"minLength": a * b} for a in range(20)]} for b in range(3)]},
        ["too many combinations"],
    ),
    "circle": (
        {"$defs": {"a": {"$ref": "#/$defs/a", "type": "string"}}, "$ref": "#/$defs/a"},
        ["is defined by itself"],
    ),
    "unevaluated": (
        {"not": {"required": ["a"]}, "properties": {"b": J}, "unevaluatedProperties": False},
        ["'unevaluatedProperties' beside a negation"],
    ),
    "all": (
        obj({"a": string(format="regex"), "b": arr(J, uniqueItems=True)}),
        ["a: has the format", "b has 'uniq"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(name):
    schema, messages = REFUSED[name]
    with pytest.raises(ConstraintError) as caught:
        json_schema(json.dumps(schema))
    for message in messages:
        assert message in str(caught.value)


@for_each(text=["{", '{"type": "strnig"}', '{"maxLength": "3"}', "[]", "3", '{"minimum": NaN}'])
def test_what_is_no_schema(text):
    with pytest.raises(ConstraintError, match="not a JSON schema"):
        json_schema(text)


@for_each(
    schema=[
        False,
        obj({"a": False}, ["a"]),
        {**J, "minimum": 5, "maximum": 3},
        {**N, "exclusiveMinimum": 1, "maximum": 1},
        arr(J, minItems=3, maxItems=2),
        string(minLength=3, maxLength=2),
        {"allOf": [S, J]},
        {"enum": [1, 2], "type": "string"},
        obj({"a": J}, ["b"], additionalProperties=False),
        obj({"a": {"$ref": "#"}}, ["a"]),
    ]
)
def test_what_nothing_satisfies(schema):
    with pytest.raises(ConstraintError, match="Nothing satisfies"):
        compiled(schema)


def test_a_long_list_of_properties_does_not_recurse():
    names = [f"p{index}" for index in range(600)]
    grammar = json_schema(json.dumps(obj(dict.fromkeys(names, J), names)))
    assert not Networks(grammar, max_states=20_000).recursive


def test_what_nests_deep_is_written_once_a_level() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(12):
        schema = {"type": "array", "items": schema}
    assert len(written(json_schema(json.dumps(schema)))) < 20_000


def test_a_long_list_of_values_is_not_searched_for_each_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*args: Any) -> None:
        raise AssertionError(args)

    monkeypatch.setattr(Draft202012Validator, "is_valid", never)
    grammar = json_schema(json.dumps({"enum": list(range(5000))}))
    assert len(grammar.rules["#"].options) == 5000


@for_each(
    schema=[
        {"enum": [1], "$ref": "#/nowhere"},
        {"const": 1, "$ref": "http://other/place"},
        {"enum": [{"a": 1}], "properties": {"a": {"$ref": "#/nowhere"}}},
        {"$id": "http://[bad", "properties": {"a": {"$ref": "#/x"}}},
    ]
)
def test_a_reference_that_leads_nowhere_is_the_clients_mistake(schema):
    with pytest.raises(ConstraintError, match=r"leads|Invalid"):
        json_schema(json.dumps(schema))
