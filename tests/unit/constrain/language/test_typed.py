"""The types that a schema gives arguments which were read as texts."""

from __future__ import annotations

import time
from typing import Any

import pytest

from vllm_diffusion.constrain.language.typed import Types

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "number": {"$ref": "#/$defs/number"},
        "text": {"$ref": "#/$defs/text"},
        "either": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/number"}, {"const": "x"}]},
        "node": {"$ref": "#/$defs/node"},
        "pair": {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"const": 1}},
        "open": {},
    },
    "additionalProperties": {"type": "number"},
    "$defs": {
        "number": {"type": "integer"},
        "text": {"type": "string"},
        "node": {
            "type": "object",
            "properties": {"next": {"$ref": "#/$defs/node"}, "value": {"type": "number"}},
        },
    },
}


@pytest.mark.parametrize(
    ("raw", "typed"),
    [
        ({"number": "3"}, {"number": 3}),
        ({"number": "three"}, {"number": "three"}),
        ({"text": "3"}, {"text": "3"}),
        ({"either": "null"}, {"either": None}),
        ({"either": "7"}, {"either": 7}),
        ({"either": "x"}, {"either": "x"}),
        ({"node": {"next": {"value": "1.5"}}}, {"node": {"next": {"value": 1.5}}}),
        ({"pair": ["true", "1", "1"]}, {"pair": [True, 1, 1]}),
        ({"open": "3", "more": "3"}, {"open": "3", "more": 3}),
    ],
)
def test_values_get_the_types_of_their_places(raw: dict[str, Any], typed: dict[str, Any]) -> None:
    found = Types(SCHEMA).typed(raw, raw)
    assert found == typed
    assert repr(found) == repr(typed)  # True is not 1


def test_what_vllm_has_typed_stays() -> None:
    guessed = {"number": 3, "text": "3", "open": {"a": [1]}}
    assert (
        Types(SCHEMA).typed({"number": "3", "text": "3", "open": '{"a": [1]}'}, guessed) == guessed
    )


def test_no_expression_is_searched_for() -> None:
    slow = {"pattern": "^(a|a)*$", "patternProperties": {"^(a|a)*$": {"type": "integer"}}}
    schema = {"properties": {"a": {**slow, "$ref": "#/$defs/n"}}, "$defs": {"n": {}}, **slow}
    began = time.monotonic()
    Types(schema).typed({"a": "a" * 60 + "!", "a" * 60 + "!": "1"}, {"a": "x", "a" * 60 + "!": "1"})
    assert time.monotonic() - began < 2


def test_a_schema_of_itself() -> None:
    Types({"$ref": "#", "anyOf": [{"$ref": "#"}]}).typed({"a": "1"}, {"a": "1"})
