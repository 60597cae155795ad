"""Schemas of older drafts, held to the validators of those drafts."""

import json
from copy import deepcopy

import numpy as np
import pytest
from helpers.spelling import END, VOCABULARY, Walk, accepts, spelled
from jsonschema import Draft4Validator, Draft7Validator

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.language.drafts import modern
from vllm_diffusion.errors import ConstraintError

CASES = {
    "a tuple and nothing behind it": (
        Draft7Validator,
        {
            "type": "array",
            "items": [{"type": "integer", "minimum": 0, "maximum": 9}, {"const": "a"}],
            "additionalItems": False,
            "minItems": 2,
        },
        [[3, "a"]],
        [["a", 3], [3], [3, "a", 1]],
    ),
    "a tuple and more": (
        Draft7Validator,
        {
            "type": "array",
            "items": [{"const": 1}],
            "additionalItems": {"const": 2},
            "minItems": 1,
            "maxItems": 4,
        },
        [[1], [1, 2, 2]],
        [[2], [1, 1]],
    ),
    "bounds that are exclusive": (
        Draft4Validator,
        {
            "type": "integer",
            "minimum": 2,
            "exclusiveMinimum": True,
            "maximum": 5,
            "exclusiveMaximum": False,
        },
        [3, 5],
        [2, 6],
    ),
    "inside of others": (
        Draft7Validator,
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"pair": {"type": "array", "items": [{"const": 1}], "minItems": 1}},
            "type": "object",
            "properties": {
                "items": {"$ref": "#/definitions/pair"},
                "b": {"anyOf": [{"$ref": "#/definitions/pair"}, {"type": "null"}]},
            },
            "required": ["items"],
            "additionalProperties": False,
        },
        [{"items": [1]}, {"items": [1], "b": None}],
        [{"items": [2]}, {"items": [1], "b": [3]}],
    ),
    "what depends on a name": (
        Draft7Validator,
        {
            "type": "object",
            "properties": {"a": {"const": 1}, "b": {"const": 2}, "c": {"const": 3}},
            "dependencies": {"a": ["b"]},
            "additionalProperties": False,
        },
        [{}, {"b": 2}, {"a": 1, "b": 2}],
        [{"a": 1}, {"a": 1, "c": 3}],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_older_draft_says_what_it_said(name):
    judge, schema, valid, invalid = CASES[name]
    before = deepcopy(schema)
    automaton = compile_constraint("json", json.dumps(schema), vocabulary=VOCABULARY, end_ids=[END])
    validator, rng, walk = judge(schema), np.random.default_rng(0), Walk(automaton, seed=0)
    for instance in valid:
        assert validator.is_valid(instance)
        assert accepts(automaton, spelled(json.dumps(instance), rng)), instance
    for instance in invalid:
        assert not validator.is_valid(instance)
        assert not accepts(automaton, spelled(json.dumps(instance), rng)), instance
    for free in (0, 2, 8, 32) * 4:
        assert validator.is_valid(json.loads(walk.text(free)))
    modern(schema)
    assert schema == before


def test_a_schema_of_today_stays_as_it_is():
    schema = {
        "properties": {"items": {"enum": [{"items": [1]}]}, "exclusiveMinimum": True},
        "const": {"items": [{}]},
        "dependencies": {"a": ["b"]},
        "exclusiveMinimum": 3,
    }
    assert modern(schema) == schema
    assert modern(True) is True
    assert modern(3) == 3


def test_what_is_no_schema_is_none_in_any_draft():
    for schema in ({"items": [3]}, {"exclusiveMinimum": "x"}, {"properties": []}):
        with pytest.raises(ConstraintError, match="not a JSON schema"):
            compile_constraint("json", json.dumps(schema), vocabulary=VOCABULARY, end_ids=[END])
