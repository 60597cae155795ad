"""What becomes of a constraint, and how long it is kept."""

import json

import numpy as np
import pytest
from helpers.spelling import END, VOCABULARY, accepts, spelled

from vllm_diffusion.constrain import outcomes
from vllm_diffusion.constrain.automaton.classes import Limits
from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.packed import packed, unpacked
from vllm_diffusion.constrain.outcomes import (
    ConstraintSource,
    KeptByAutomaton,
    KeptByParser,
    OutcomeCache,
    Refused,
    outcome_of,
)

RNG = np.random.default_rng(0)
SMALL = Limits(states=20)


def source(kind, text, **options):
    text = text if isinstance(text, str) else json.dumps(text)
    return ConstraintSource(kind=kind, text=text, end_ids=(END,), **options)


@pytest.mark.parametrize("text", ["a{1,3}b|c", "(a|b)*", ""])
def test_an_automaton_survives_its_packing(text):
    automaton = compile_constraint("regex", text, vocabulary=VOCABULARY, end_ids=[END])
    again = unpacked(packed(automaton))
    for field in ("class_of", "source", "symbol", "target", "accepting", "distance"):
        before, after = getattr(automaton, field), getattr(again, field)
        assert before.dtype == after.dtype
        assert np.array_equal(before, after)
    for field in ("num_classes", "num_states", "start", "depth"):
        assert getattr(automaton, field) == getattr(again, field)


def test_how_deep_an_automaton_nests_survives_too():
    text = 'root ::= "(" root ")" | "a"'
    automaton = compile_constraint("grammar", text, vocabulary=VOCABULARY, end_ids=[END])
    assert automaton.depth is not None
    assert unpacked(packed(automaton)).depth == automaton.depth


def test_an_automaton_keeps_what_it_can():
    outcome = outcome_of(source("regex", "a{2,3}"), VOCABULARY)
    assert isinstance(outcome, KeptByAutomaton)
    assert not outcome.in_room
    automaton = unpacked(outcome.data)
    assert accepts(automaton, spelled("aa", RNG))
    assert not accepts(automaton, spelled("a", RNG))
    assert outcome.tokens == automaton.distance[automaton.start]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "a{30,40}"),
        ("json", {"type": "string", "minLength": 28, "maxLength": 90}),
        (
            "structural_tag",
            {"format": {"type": "regex", "pattern": "b{30}"}, "type": "structural_tag"},
        ),
    ],
)
def test_a_parser_keeps_what_is_too_large(kind, text):
    import xgrammar

    outcome = outcome_of(source(kind, text), VOCABULARY, limits=SMALL)
    assert isinstance(outcome, KeptByParser)
    assert outcome.length == 30
    rules = xgrammar.Grammar.deserialize_json(outcome.data.decode())
    assert "root" in str(rules)


def test_a_parser_reads_what_is_never_translated():
    tag = {"type": "structural_tag", "format": {"type": "any_text", "max_tokens": 5}}
    outcome = outcome_of(source("structural_tag", tag), VOCABULARY)
    assert isinstance(outcome, KeptByParser | Refused)
    if isinstance(outcome, KeptByParser):
        assert outcome.length == 0, "nobody knows"


def test_bounds_beyond_the_room_are_none():
    asked = source("json", {"type": "string", "maxLength": 500})
    outcome = outcome_of(asked, VOCABULARY, room=20, limits=SMALL)
    assert isinstance(outcome, KeptByAutomaton)
    assert outcome.in_room
    assert isinstance(outcome_of(asked, VOCABULARY, limits=SMALL), KeptByParser)
    everywhere = outcome_of(source("regex", "a{2,3}"), VOCABULARY, room=20)
    assert isinstance(everywhere, KeptByAutomaton)
    assert not everywhere.in_room


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("regex", "(a", "unterminated"),
        ("json", False, "Nothing satisfies"),
        ("regex", "a" * 30, "shortest text of the constraint has 30 bytes"),
        ("regex", "(" * 3000 + ")" * 3000, "nested too deep"),
        ("choice", "[1]", "list of strings"),
    ],
)
def test_what_is_refused_says_why(kind, text, said):
    outcome = outcome_of(source(kind, text), VOCABULARY, room=20)
    assert isinstance(outcome, Refused)
    assert said in outcome.message


def test_rules_without_end_are_no_parsers_either(monkeypatch):
    asked = source("regex", "a{30,40}")
    monkeypatch.setattr(outcomes, "MOST_PARSER_BYTES", 100)
    outcome = outcome_of(asked, VOCABULARY, limits=SMALL)
    assert isinstance(outcome, Refused)
    assert "A parser of the constraint needs" in outcome.message
    monkeypatch.setattr(outcomes, "MOST_RULE_BYTES", 100)
    outcome = outcome_of(asked, VOCABULARY, limits=SMALL)
    assert isinstance(outcome, Refused)
    assert "bytes of rules" in outcome.message


def test_the_cache_keeps_what_fits():
    kept = KeptByAutomaton(data=bytes(2000), tokens=1, in_room=False)
    cache = OutcomeCache(6000)
    for name in "abc":
        cache.put(name, kept)
    assert cache.get("a") is None, "the least recently used one"
    assert cache.get("b") is kept
    cache.put("d", kept)
    assert cache.get("c") is None
    assert cache.get("b") is kept
    assert 0 < cache.nbytes <= 6000
    cache.put("b", Refused(message="x"))
    cache.put("d", Refused(message="x"))
    assert len(cache) == 2
    assert cache.nbytes < 2000
    cache.put("e", KeptByAutomaton(data=bytes(9000), tokens=1, in_room=False))
    assert len(cache) == 0
    assert cache.nbytes == 0


def test_many_refusals_are_counted():
    cache = OutcomeCache(100_000)
    for number in range(1000):
        cache.put(number, Refused(message="no " * 100))
    assert len(cache) < 100
