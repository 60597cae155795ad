"""Grammars over the table model's vocabulary, and judges of their texts that owe them nothing.

Gives ids something to write (``VOCABULARY``), a compiler for it, and for every grammar a function
that says whether a text is one of its. Every text that a grammar allows can be written: no token
leads where none goes on.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from typing import TYPE_CHECKING

from helpers.table_model import VOCAB
from vllm_diffusion.constrain.grammar import GrammarCompiler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import xgrammar

END, OTHER_END, SILENT = 0, 1, 2

_CHARACTERS = "{}[]():,.+-*/ \n" + '"0123456789abceflnrstuE'
_PIECES = ('{"', '":', '",', '": ', "true", "false", "null", "}}", "]]", "[[", "((", "))", ", ")
_WORDS = ("ab", "12", "00", '"a"', '"a":', "[]", "()(")

VOCABULARY: tuple[bytes, ...] = (
    *(b"", b"", b""),
    *(each.encode() for each in (*_CHARACTERS, *_PIECES, *_WORDS)),
)[:VOCAB]
assert len(VOCABULARY) == VOCAB


JSON = ("json_object", "")
ARITHMETIC = (
    "grammar",
    """
    root ::= sum
    sum ::= product (("+" | "-") product)*
    product ::= value (("*" | "/") value)*
    value ::= [1-9] [0-9]? | "(" sum ")"
    """,
)
BRACKETS = ("grammar", 'root ::= pair+\npair ::= "(" pair* ")" | "[" pair* "]"')
TREE = (
    "json",
    json.dumps(
        {
            "$ref": "#/$defs/node",
            "$defs": {
                "node": {
                    "type": "object",
                    "properties": {
                        "a": {"type": "integer"},
                        "b": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                    },
                    "required": ["a", "b"],
                    "additionalProperties": False,
                }
            },
        }
    ),
)


def _is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def _is_arithmetic(text: str) -> bool:
    assert re.fullmatch(r"[0-9()+*/-]+", text)
    allowed = (ast.Expression, ast.BinOp, ast.Constant, ast.operator)
    return all(isinstance(node, allowed) for node in ast.walk(ast.parse(text, mode="eval")))


def _is_balanced(text: str) -> bool:
    while (shorter := text.replace("()", "").replace("[]", "")) != text:
        text = shorter
    return not text


def _is_tree(text: str) -> bool:
    def node(value: object) -> bool:
        assert isinstance(value, dict)
        return (
            list(value) == ["a", "b"]
            and isinstance(value["a"], int)
            and all(node(each) for each in value["b"])
        )

    return node(json.loads(text))


JUDGES: dict[tuple[str, str], Callable[[str], bool]] = {
    JSON: _is_object,
    ARITHMETIC: _is_arithmetic,
    BRACKETS: _is_balanced,
    TREE: _is_tree,
}
"""By grammar. They raise or return False for a text that is not one."""


@cache
def compiler() -> GrammarCompiler:
    """Of ``VOCABULARY``."""
    return GrammarCompiler(VOCABULARY, threads=1)


def compiled(grammar: tuple[str, str]) -> xgrammar.CompiledGrammar:
    return compiler().compile(*grammar)


def written(tokens: Sequence[int], ends: Sequence[int] = (END,)) -> tuple[str, bool]:
    """The text of some tokens up to an end token, and whether there was one."""
    place = next((at for at, token in enumerate(tokens) if token in ends), None)
    return b"".join(VOCABULARY[token] for token in tokens[:place]).decode(), place is not None


def may_be_begun(grammar: tuple[str, str], tokens: Sequence[int]) -> bool:
    """Whether a text of the grammar begins so."""
    import xgrammar

    matcher = xgrammar.GrammarMatcher(compiled(grammar), override_stop_tokens=[END])
    return all(matcher.accept_token(token) for token in tokens)
