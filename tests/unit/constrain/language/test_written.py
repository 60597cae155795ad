"""A grammar written for xgrammar accepts what its automaton accepts, and nothing else."""

import json

import pytest
import xgrammar
from helpers.cases import for_each
from helpers.schemas import TABLE
from helpers.spelling import END, VOCABULARY, Walk
from xgrammar.testing import _is_grammar_accept_string

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.network import Networks
from vllm_diffusion.constrain.language.kinds import grammar_of
from vllm_diffusion.constrain.language.syntax import (
    NOTHING,
    Chars,
    Grammar,
    Text,
    choice,
    mark,
    sequence,
)
from vllm_diffusion.constrain.language.written import written
from vllm_diffusion.errors import ConstraintError


def read(kind, text):
    return xgrammar.Grammar.from_ebnf(written(grammar_of(kind, text)))


@for_each(name=TABLE)
def test_a_schema(name):
    schema, _, invalid = TABLE[name]
    text = json.dumps(schema)
    grammar = read("json", text)
    automaton = compile_constraint("json", text, vocabulary=VOCABULARY, end_ids=[END])
    walk = Walk(automaton, seed=1)
    for free in (0, 3, 9, 20):
        said = b"".join(VOCABULARY.text(token) for token in walk.tokens(free)).decode()
        assert _is_grammar_accept_string(grammar, said), said
    for instance in invalid:
        assert not _is_grammar_accept_string(grammar, json.dumps(instance, ensure_ascii=False))


@pytest.mark.parametrize(
    ("expression", "good", "bad"),
    [
        ("[a-cé]{2,3}-?]|x", ["ab]", "éa-]", "x"], ["a]", "abcd]", ""]),
        ("(日本|🙂)*", ["", "日本🙂"], ["日"]),
        ("a{0}b+", ["b", "bb"], ["ab", ""]),
    ],
)
def test_an_expression(expression, good, bad):
    grammar = read("regex", expression)
    assert all(_is_grammar_accept_string(grammar, text) for text in good)
    assert not any(_is_grammar_accept_string(grammar, text) for text in bad)


def test_a_parser_follows_as_deep_as_it_likes():
    grammar = read("json_object", "")
    deep = '{"a":' * 40 + "[]" + "}" * 40
    assert _is_grammar_accept_string(grammar, deep)
    assert not _is_grammar_accept_string(grammar, deep[:-1])


def test_a_long_list_is_written_by_what_its_values_share():
    values = [f"wert {n // 7} von {n}é" for n in range(2000)]
    text = written(grammar_of("choice", json.dumps(values)))
    assert len(text) < 100_000
    grammar = xgrammar.Grammar.from_ebnf(text)
    assert all(_is_grammar_accept_string(grammar, value) for value in values[::50])
    for other in ("wert 0 von 7é", "wert 0 von 0", "wert 0 von 0é ", ""):
        assert not _is_grammar_accept_string(grammar, other)


@pytest.mark.parametrize("node", [NOTHING, Text(b"\xc3")])
def test_what_cannot_be_written(node):
    with pytest.raises(ConstraintError):
        written(Grammar({"only": node}, "only"))


def test_names_of_rules_do_not_matter():
    rules = {"a b": Chars(((97, 98),)), "root": Text(b"other")}
    assert _is_grammar_accept_string(
        xgrammar.Grammar.from_ebnf(written(Grammar(rules, "a b"))), "b"
    )


def test_a_special_token_is_written_by_its_id():
    node = sequence(Text(b"a" + mark(7) + mark(258) + b"b"), choice(Text(mark(9)), Text(b"c")))
    text = written(Grammar({"only": node}, "only"))
    again = grammar_of("grammar", text)
    assert Networks(again, max_states=99).automaton(0).accepts(b"a" + mark(7) + mark(258) + b"bc")
    assert (
        Networks(again, max_states=99)
        .automaton(0)
        .accepts(b"a" + mark(7) + mark(258) + b"b" + mark(9))
    )
