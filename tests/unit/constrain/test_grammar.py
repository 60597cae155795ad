"""Kinds of constraints as compiled grammars: what they allow, what is refused and how."""

from __future__ import annotations

import json

import pytest
import xgrammar
from helpers.grammars import END, VOCABULARY

from vllm_diffusion.constrain.grammar import GrammarCompiler
from vllm_diffusion.errors import ParamsError

BYTES = (b"", b"", *(bytes([each]) for each in range(256)))
SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
TAG = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": True}}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(BYTES, threads=1)


def allows(compiled: xgrammar.CompiledGrammar, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=[END])
    return matcher.accept_string(text) and matcher.accept_token(END)


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json", SCHEMA, '{"a": 1}', '{"a": "1"}'),
        ("json_object", "", '{"x": [{}]}', "[1]"),
        ("regex", "a[bc]+|é", "abcb", "a"),
        ("choice", '["one", "a\\n\\"b\\\\", "é"]', 'a\n"b\\', "on"),
        ("choice", '["one", "two"]', "two", "onetwo"),
        ("grammar", 'root ::= "a" root "b" | "c"', "aacbb", "aacb"),
        ("grammar", 'start: "a" start "b" | "c"\n', "aacbb", "aacb"),
        ("structural_tag", json.dumps(TAG), "[1]", "[1"),
    ],
)
def test_a_kind_allows_what_it_says(
    compiler: GrammarCompiler, kind: str, text: str, good: str, bad: str
) -> None:
    compiled = compiler.compile(kind, text)
    assert allows(compiled, good)
    assert not allows(compiled, bad)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", "{", "not a JSON schema"),
        ("json", '{"type": "number!"}', "'number!' is not valid"),
        ("json", '{"$ref": "#/nowhere"}', "nowhere"),
        ("json", "false", "Nothing satisfies"),
        ("regex", "a(", "unterminated subpattern"),
        ("choice", "[]", "cannot be read"),
        ("choice", "3", "cannot be read"),
        ("grammar", "root ::= other", 'Rule "other" is not defined'),
        ("grammar", "something", "Lark error"),
        ("structural_tag", '{"a": 1}', "must have a format"),
        ("structural_tag", "x", "Failed to parse JSON"),
        ("poem", "x", "A constraint is one of json"),
        ("grammar", r"root ::= [^\x00-\U0010FFFF]", "No token of the vocabulary can begin"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    compiler: GrammarCompiler, kind: str, text: str, reason: str
) -> None:
    with pytest.raises(ParamsError, match=kind) as refused:
        compiler.compile(kind, text)
    assert reason in str(refused.value)
    assert ".cc:" not in str(refused.value), "where in xgrammar's source is nobody's business"


def test_a_text_that_no_token_begins_is_refused() -> None:
    with pytest.raises(ParamsError, match="No token"):
        GrammarCompiler(VOCABULARY, threads=1).compile("choice", '["xyz"]')


def test_nothing_at_all_is_a_text(compiler: GrammarCompiler) -> None:
    assert allows(compiler.compile("regex", ""), "")


def test_a_grammar_is_compiled_once() -> None:
    compiler = GrammarCompiler(BYTES, threads=1)
    compiler.compile("json", SCHEMA)
    kept = compiler._compiler.get_cache_size_bytes()
    assert kept > 0
    compiler.compile("json", SCHEMA)
    assert compiler._compiler.get_cache_size_bytes() == kept
    compiler.compile("json_object", "")
    assert compiler._compiler.get_cache_size_bytes() > kept


def test_tokens_that_write_nothing_stand_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    # Id 1 ends this request's text, 0 another's: here it is as silent as any special token.
    compiler = GrammarCompiler(BYTES, threads=1)
    guard = compiler.guard(compiler.compile("regex", "a+"), end_tokens=[1])
    a = BYTES.index(b"a")
    assert guard.walk([0]) == 0
    assert guard.walk([a, 0, a]) == 1
    assert guard.legal().nonzero()[:, 0].tolist() == [1, a]
    assert guard.walk([1, 0]) == 2
    assert capfd.readouterr().err == "", "xgrammar reports what it refuses"
