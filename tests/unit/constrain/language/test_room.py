"""Bounds that a text of limited length cannot reach are none; what does not fit is told at once."""

import json

import numpy as np
import pytest
from helpers.cases import for_each
from helpers.spelling import END, VOCABULARY, accepts, spelled

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.kinds import grammar_of
from vllm_diffusion.constrain.language.room import shortest, within
from vllm_diffusion.errors import AutomatonError, ConstraintError


def compiled(kind, text, room):
    return compile_constraint(kind, text, vocabulary=VOCABULARY, end_ids=[END], room=room)


@pytest.mark.parametrize(
    ("kind", "text", "length"),
    [
        ("json", {"type": "object"}, 2),
        ("json", {"type": "array", "items": {"type": "string", "minLength": 3}, "minItems": 2}, 13),
        (
            "json",
            {
                "$defs": {
                    "a": {
                        "anyOf": [
                            {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1},
                            {"const": 5},
                        ]
                    }
                },
                "type": "array",
                "items": {"$ref": "#/$defs/a"},
                "minItems": 1,
            },
            3,
        ),
        ("json", False, None),
        ("regex", "(ab){7,9}é?", 14),
        ("regex", "[é-ÿ]x*", 2),
        ("choice", ["abc", "de"], 2),
        ("grammar", 'root ::= "a" root | "b" "c"', 2),
    ],
)
def test_the_shortest_text(kind, text, length):
    source = text if isinstance(text, str) else json.dumps(text)
    assert shortest(grammar_of(kind, source)) == length


@for_each(
    expression=[
        "(ab|c){2,7}",
        "a{0,9}b",
        "(a?b?){0,8}",
        "(ab{3,5}){1,4}",
        "(a{4,6}|b){1,3}",
        "(a?){3,6}",
    ],
    room=[4, 9, 30],
)
def test_texts_that_fit_are_the_same_ones(expression, room):
    grammar = grammar_of("regex", expression)
    exact = Networks(grammar, max_states=500).automaton(0)
    near = Networks(within(grammar, room), max_states=500).automaton(0)
    words = [""]
    for _ in range(min(room, 9)):
        words += [word + letter for word in words[-(3**7) :] for letter in "abc"]
    for word in dict.fromkeys(words):
        if len(word) <= room:
            assert exact.accepts(word.encode()) == near.accepts(word.encode()), word


def test_a_bound_beyond_the_room_is_none():
    schema = {
        "type": "array",
        "items": {"type": "string", "maxLength": 524_288},
        "maxItems": 10**30,
    }
    with pytest.raises(AutomatonError):
        compiled("json", json.dumps(schema), None)
    automaton = compiled("json", json.dumps(schema), 4096)
    assert automaton.num_states < 50
    assert accepts(automaton, spelled(json.dumps(["x" * 300] * 3), np.random.default_rng(0)))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json", '{"type": "string", "minLength": 100000}'),
        ("json", '{"type": "array", "minItems": 100000}'),
        ("json", '{"type": "array", "items": {"type": "string", "minLength": 60}, "minItems": 70}'),
        ("regex", "(ab){3000,}"),
    ],
)
def test_what_does_not_fit_is_told(kind, text):
    with pytest.raises(ConstraintError, match=r"shortest text of the constraint has \d+ bytes"):
        compiled(kind, text, 4096)
