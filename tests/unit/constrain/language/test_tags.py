import json
import re
from itertools import product

import pytest

from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.tags import structural_tag
from vllm_diffusion.errors import AutomatonError, ConstraintError

NULL = {"type": "json_schema", "json_schema": {"type": "null"}}
A = {"type": "regex", "pattern": "a+"}


def tag(content, begin="<f>", end="</f>"):
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def automaton(form, **more):
    document = {"type": "structural_tag", "format": form} if "type" in form else form
    grammar = structural_tag(json.dumps({**document, **more}))
    return Networks(grammar, max_states=2000).automaton(0)


CASES = {
    "constant": ({"type": "const_string", "value": "aé"}, ["aé"], ["a", ""]),
    "tag": (tag(A), ["<f>aa</f>"], ["<f></f>", "aa", "<f>a</f>a"]),
    "ends": (tag(A, end=["]", "}"]), ["<f>a]", "<f>a}"], ["<f>a"]),
    "text in a tag": (tag({"type": "any_text"}), ["<f></f>", "<f>a<</f>"], ["<f>", "<f></f></f>"]),
    "schema": (tag(NULL), ["<f>null</f>"], ["<f>0</f>"]),
    "grammar": ({"type": "grammar", "grammar": 'root ::= x\nx ::= "b"+'}, ["bb"], [""]),
    "sequence": (
        {"type": "sequence", "elements": [A, {"type": "const_string", "value": "."}]},
        ["a."],
        ["a"],
    ),
    "either": ({"type": "or", "elements": [A, tag(A)]}, ["aa", "<f>a</f>"], ["<f>"]),
    "optional": ({"type": "optional", "content": tag(NULL)}, ["", "<f>null</f>"], ["null"]),
    "star": ({"type": "star", "content": tag(A)}, ["", "<f>a</f><f>aa</f>"], ["a"]),
    "plus": ({"type": "plus", "content": tag(A)}, ["<f>a</f>"], [""]),
    "repeat": (
        {"type": "repeat", "content": tag(A), "min": 1, "max": 2},
        ["<f>a</f>" * 2],
        ["<f>a</f>" * 3],
    ),
    "separated": (
        {"type": "tags_with_separator", "tags": [tag(A)], "separator": ",", "at_least_one": True},
        ["<f>a</f>", "<f>a</f>,<f>aa</f>"],
        ["", "<f>a</f><f>a</f>", ","],
    ),
    "triggered": (
        {"type": "triggered_tags", "triggers": ["<f"], "tags": [tag(A), tag(NULL, "<fx>")]},
        ["", "hi <", "<f>a</f>", "é<<f>a</f>b<fx>null</f>"],
        ["<f", "<f>", "<fy>", "<fx>a</f>"],
    ),
    "needed once": (
        {
            "type": "triggered_tags",
            "triggers": ["<f"],
            "tags": [tag(A)],
            "at_least_one": True,
            "stop_after_first": True,
        },
        ["<f>a</f>"],
        ["", "x<f>a</f>", "<f>a</f>x"],
    ),
    "once": (
        {"type": "triggered_tags", "triggers": ["<f"], "tags": [tag(A)], "stop_after_first": True},
        ["", "x<f>a</f>"],
        ["<f>a</f>x", "<f"],
    ),
    "older form": (
        {
            "structures": [{"begin": "<f>", "schema": {"type": "null"}, "end": "</f>"}],
            "triggers": ["<f"],
        },
        ["x<f>null</f>y", "x"],
        ["<f>0</f>"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_formats(name):
    form, accepted, refused = CASES[name]
    found = automaton(form)
    for each in accepted:
        assert found.accepts(each.encode()), each
    for each in refused:
        assert not found.accepts(each.encode()), each


def test_free_text_stops_before_any_occurrence():
    found = automaton({"type": "any_text", "excludes": ["aab", "ba"]})
    for length in range(7):
        for word in map("".join, product("abc", repeat=length)):
            assert found.accepts(word.encode()) == (re.search("aab|ba", word) is None), word


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        ({"type": "token", "token": 5}, AutomatonError, "'token' is not supported"),
        ({"type": "any_text", "max_chars": 3}, AutomatonError, "counts tokens or characters"),
        (
            tag(A, begin={"type": "token", "token": 5}),
            AutomatonError,
            "begins or ends with a token",
        ),
        ({"type": "nonsense"}, ConstraintError, "not a structural tag"),
        ({"structures": [{}], "triggers": []}, ConstraintError, "not a structural tag"),
        (
            tag({"type": "json_schema", "json_schema": {"multipleOf": 1001}}),
            ConstraintError,
            "has 'multipleOf' 1001",
        ),
    ],
)
def test_what_is_refused(form, error, message):
    with pytest.raises(error, match=message):
        automaton(form)
