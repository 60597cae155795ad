"""Compile time of constraints and size of their automata.

    python benchmarks/constraints.py [--vocab N] [--quick] [--json FILE]

The vocabulary is made up, of Gemma's size and shape: bytes to fall back on, characters of many
scripts, runs of white space and of punctuation, single digits, and pronounceable words in lower
case, capitalised and in capitals, with and without a space before them, and the words of the tools
of `testing.tool_lists`. `trie ms` is building its trie, which a server does once. Every constraint
is compiled five times without a cache; medians.
The first grammar also imports xgrammar. `depth` is how deep a recursive one is followed.
"""

from __future__ import annotations

import json
import random
import string
import time
from dataclasses import astuple
from itertools import chain, islice, product
from statistics import median
from typing import TYPE_CHECKING, Any

import _report

from vllm_diffusion.constrain.automaton.compile import compile_constraint
from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
from vllm_diffusion.constrain.language.calls import AskedCalls, Function
from vllm_diffusion.errors import ConstraintError
from vllm_diffusion.testing.tool_lists import browser, code_host, file_system, words

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SPECIAL = 16
END = 1

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "email": {"type": "string", "format": "email"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TOOL = {
    "anyOf": [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string"},
                        "unit": {"enum": ["celsius", "fahrenheit"]},
                        "days": {"type": "integer", "minimum": 1, "maximum": 14},
                    },
                    "required": ["city"],
                },
            },
            "required": ["name", "parameters"],
        }
        for name in ("get_weather", "get_forecast", "find_station")
    ]
}
_INVOICE = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^INV-[0-9]{6}$"},
        "date": {"type": "string", "format": "date"},
        "customer": _PERSON,
        "lines": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "item": {"type": "string", "maxLength": 40},
                    "count": {"type": "integer", "minimum": 1},
                    "price": {"type": "number", "minimum": 0},
                },
                "required": ["item", "count", "price"],
            },
        },
        "paid": {"type": "boolean"},
    },
    "required": ["id", "date", "customer", "lines"],
}
_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "string"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["value"],
        }
    },
    "$ref": "#/$defs/node",
}
_ARITHMETIC = """root ::= sum
sum ::= sum [+*/-] atom | atom
atom ::= [0-9]+ | "(" sum ")"
"""

TOOL_FORM = "vllm_diffusion.models.diffusion_gemma.tools.calls:call_grammar"
_CALL_TOKENS = {"begin": 2, "end": 3, "quote": 4}


def _calls(tools: list[dict[str, Any]]) -> tuple[str, str]:
    """Required calls of tools in Gemma's form."""
    functions = tuple(Function(**tool, strict=False) for tool in tools)
    asked = AskedCalls(functions=functions, tokens=_CALL_TOKENS, required=True, several=True)
    tag = {"type": "structural_tag", "format": {"type": "grammar", "grammar": asked.as_text()}}
    return "structural_tag", json.dumps(tag)


_TOOLS = [*code_host(), *browser(), *file_system()]

CONSTRAINTS = {
    "yes or no": ("choice", '["yes", "no"]'),
    "100 countries": ("choice", json.dumps([f"country number {n}" for n in range(100)])),
    "digits": ("regex", r"\d{4}-\d{2}-\d{2}"),
    "e-mail": ("regex", r"[\w.+-]+@[\w-]+(\.[\w-]+)+"),
    "sentence": ("regex", r"[A-Z][a-z]*( [a-z]+){3,30}\."),
    "person": ("json", json.dumps(_PERSON)),
    "tool call": ("json", json.dumps(_TOOL)),
    "invoice": ("json", json.dumps(_INVOICE)),
    "64 properties": (
        "json",
        json.dumps(
            {
                "type": "object",
                "properties": {f"field_{n}": {"type": "string"} for n in range(64)},
                "required": [f"field_{n}" for n in range(64)],
            }
        ),
    ),
    "30 optional": (
        "json",
        json.dumps(
            {"type": "object", "properties": {f"field_{n}": {"type": "string"} for n in range(30)}}
        ),
    ),
    "string of 200": ("json", json.dumps({"type": "string", "maxLength": 200})),
    "tree": ("json", json.dumps(_TREE)),
    "any object": ("json_object", ""),
    "arithmetic": ("grammar", _ARITHMETIC),
    "tools of files": _calls(file_system()),
    "tools of a browser": _calls(browser()),
    "tools of a code host": _calls(code_host()),
    "all these tools": _calls(_TOOLS),
}


def synthetic_tokens(count: int, known: Iterable[str] = ()) -> list[bytes]:
    """Byte strings of a vocabulary; the first ``SPECIAL`` are special tokens and write nothing.

    Args:
        count: of the tokens.
        known: words that are tokens, and so are their beginnings, each with and without a capital.
    """
    found: dict[bytes, None] = dict.fromkeys([b""])  # stands for the special tokens
    begun = (word[:length] for word in known for length in range(2, len(word) + 1))
    forms = (form.encode() for each in begun for form in (each, each.capitalize(), f"_{each}"))
    for token in chain(forms, _tokens()):
        found.setdefault(token)
        if len(found) == count - SPECIAL + 1:
            break
    return [b""] * (SPECIAL - 1) + list(found)


def _tokens() -> Iterator[bytes]:
    yield from (bytes([byte]) for byte in range(256))
    yield from (blank * n for blank in (b" ", b"\n", b"\t") for n in range(2, 32))
    yield from (b"\n" * n + b" " * m for n in (1, 2) for m in range(1, 17))
    marks = string.punctuation
    for length in (2, 3):
        for run in islice(product(marks, repeat=length), 0, None, 1 if length == 2 else 7):
            text = "".join(run).encode()
            yield from (text, b" " + text)
    yield from (mark.encode() * n for mark in "=-_*#.~/" for n in range(4, 33))
    scripts = ((0xA1, 0x24F), (0x370, 0x52F), (0x5D0, 0x6FF), (0x900, 0xDFF), (0x3041, 0x30FF))
    for first, last in (*scripts, (0x4E00, 0x9FFF), (0xAC00, 0xB400), (0x1F300, 0x1F6FF)):
        yield from (chr(point).encode() for point in range(first, last + 1))
    rng = random.Random(0)
    consonants = [
        "b",
        "c",
        "d",
        "f",
        "g",
        "h",
        "j",
        "k",
        "l",
        "m",
        "n",
        "p",
        "r",
        "s",
        "t",
        "v",
        "w",
        "z",
        "th",
        "st",
        "tr",
        "pl",
        "qu",
        "sh",
        "ch",
    ]
    vowels = [*("aeiou" * 4), "ea", "ou", "y", "é", "ü"]
    endings = ["", "n", "s", "r", "ing", "ed", "t"]
    while True:
        syllables = [rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.randint(1, 4))]
        word = "".join(syllables) + rng.choice(endings)
        for form in (word, word.capitalize(), word.upper()):
            yield from (form.encode(), b" " + form.encode())


def main() -> None:
    """Compile every constraint of the table and print what it took."""
    arguments = _report.parser(__doc__)
    arguments.add_argument("--vocab", type=int, default=262_144)
    options = arguments.parse_args()
    tokens = synthetic_tokens(options.vocab, words(_TOOLS))
    begin = time.perf_counter()
    vocabulary = Vocabulary.of(tokens, astuple(_CALL_TOKENS))
    trie = 1e3 * (time.perf_counter() - begin)
    rows = []
    for name, (kind, text) in CONSTRAINTS.items():
        seconds = []
        for _ in range(1 if options.quick else 5):
            begin = time.perf_counter(), time.process_time()
            try:
                automaton = compile_constraint(
                    kind, text, vocabulary=vocabulary, end_ids=[END], tool_form=TOOL_FORM
                )
            except ConstraintError as error:
                print(f"{name}: {error}")
                break
            seconds.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        else:
            rows.append(
                {
                    "constraint": name,
                    "ms": 1e3 * median(wall for wall, _ in seconds),
                    "cpu ms": 1e3 * median(cpu for _, cpu in seconds),
                    "worst cpu ms": 1e3 * max(cpu for _, cpu in seconds),
                    "states": automaton.num_states,
                    "classes": automaton.num_classes,
                    "edges": len(automaton.source),
                    "MB": automaton.nbytes / 1e6,
                    "depth": automaton.depth,
                }
            )
    _report.print_table(rows)
    typical = [row["cpu ms"] for row in rows if row["depth"] is None]
    results = {f"{row['constraint']}.{key}": row[key] for row in rows for key in list(row)[1:]}
    _report.finish(
        {"vocab": len(vocabulary), "trie_ms": trie, **results},
        f"{len(vocabulary)} tokens, trie {trie:.0f} ms; constraints without recursion in "
        f"{median(typical):.0f} ms of processor time (median), {max(typical):.0f} ms at most",
        options.json,
    )


if __name__ == "__main__":
    main()
