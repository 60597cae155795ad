"""Random constraints of every kind, and who judges the texts that they allow.

Takes a random generator. Gives a `Constraint`: what a request asks for, and a judge that knows
nothing of how the constraint is kept: `jsonschema`, `re`, `json`, or a few lines written for it.

    json         schemas: enums, nested objects, arrays, patterns, numbers, lengths, formats,
                 unicode, additional properties, references, recursion
    json_object  any JSON object
    regex, choice
    grammar      sums of numbers in brackets, lists of words: EBNF, with recursion
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jsonschema

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

KEYS = "name age city id tags size note x y größe 名前 first-name".split()  # noqa: SIM905 - a list
WORDS = ["red", "green", "blue", "é", "naïve", "日本", 'q"uote', "back\\slash", "tab\t", "🙂", ""]
PROMPTS = (
    "Describe the person.",
    "Alice, 41, is a nurse in Paris.",
    "Give me the record as JSON, please.",
    "sum a1 b2 c3",
    "What is 2 + 2?",
    "Écris une phrase sur la mer.",
    "x",
)


@dataclass(frozen=True, slots=True)
class Constraint:
    """What one request asks for."""

    kind: str
    """A field of vLLM's `StructuredOutputsParams`."""
    about: str
    """What of the kind it tries, for tables."""
    value: Any
    accepts: Callable[[str], bool]
    """Whether a complete text keeps to it."""


def draw_constraint(rng: random.Random) -> Constraint:
    """Any of them, schemas most often."""
    draw = rng.choice((_schema, _schema, _schema, _schema, _object, _regex, _choice, _grammar))
    return draw(rng)


# ---- JSON ---------------------------------------------------------------------------------------


def _schema(rng: random.Random) -> Constraint:
    about = rng.choice(tuple(SCHEMAS))
    return schema_constraint(SCHEMAS[about](rng), about)


def schema_constraint(schema: dict[str, Any], about: str) -> Constraint:
    """A JSON schema, judged by `jsonschema`."""
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )

    def accepts(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except ValueError:
            return False

    return Constraint("json", about, schema, accepts)


def _object(rng: random.Random) -> Constraint:
    del rng

    def accepts(text: str) -> bool:
        try:
            return isinstance(json.loads(text), dict)
        except ValueError:
            return False

    return Constraint("json_object", "any object", value=True, accepts=accepts)


def _leaf(rng: random.Random) -> dict[str, Any]:
    return rng.choice((_enum, _number, _length, _pattern, _format, _plain))(rng)


def _plain(rng: random.Random) -> dict[str, Any]:
    return {"type": rng.choice(("string", "integer", "number", "boolean", "null"))}


def _enum(rng: random.Random) -> dict[str, Any]:
    values = [*rng.sample(WORDS, rng.randint(1, 5)), *rng.sample([1, 2.5, None, True], 2)]
    return rng.choice(({"enum": values}, {"const": values[0]}))


def _number(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-300, 300)
    high = low + rng.randint(0, 500)
    return {"type": "integer", "minimum": low, "maximum": high}


def _length(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(0, 8)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 12)}


def _pattern(rng: random.Random) -> dict[str, Any]:
    patterns = (
        "^[a-z]{2,5}$",
        "^(yes|no)[0-9]*$",
        "^[A-Z][a-zé]+( [A-Z][a-z]+)?$",
        "^#[0-9a-f]{6}$",
    )
    return {"type": "string", "pattern": rng.choice(patterns)}


def _format(rng: random.Random) -> dict[str, Any]:
    return {"type": "string", "format": rng.choice(("date", "uuid", "ipv4"))}


def _record(
    rng: random.Random, member: Callable[[random.Random], dict[str, Any]]
) -> dict[str, Any]:
    keys = rng.sample(KEYS, rng.randint(1, 5))
    return {
        "type": "object",
        "properties": {key: member(rng) for key in keys},
        "required": rng.sample(keys, rng.randint(0, len(keys))),
        "additionalProperties": False,
    }


def _flat(rng: random.Random) -> dict[str, Any]:
    return _record(rng, _leaf)


def _nested(rng: random.Random) -> dict[str, Any]:
    return _record(rng, lambda rng: rng.choice((_flat, _leaf))(rng))


def _array(rng: random.Random) -> dict[str, Any]:
    least = rng.randint(0, 3)
    items = rng.choice((_leaf, _flat))(rng)
    return {
        "type": "array",
        "items": items,
        "minItems": least,
        "maxItems": least + rng.randint(0, 4),
    }


def _open(rng: random.Random) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": _leaf(rng)}


def _either(rng: random.Random) -> dict[str, Any]:
    return {"anyOf": [_flat(rng), _leaf(rng), {"type": "null"}]}


def _reference(rng: random.Random) -> dict[str, Any]:
    person = {"$ref": "#/$defs/person"}
    return {
        "$defs": {"person": _flat(rng)},
        "type": "object",
        "properties": {"one": person, "others": {"type": "array", "items": person, "maxItems": 3}},
        "required": ["one"],
        "additionalProperties": False,
    }


def _recursive(rng: random.Random) -> dict[str, Any]:
    return {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": _leaf(rng),
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }


SCHEMAS: dict[str, Callable[[random.Random], dict[str, Any]]] = {
    "enum": lambda rng: _record(rng, _enum),
    "number": lambda rng: _record(rng, _number),
    "length": lambda rng: _record(rng, _length),
    "pattern": lambda rng: _record(rng, _pattern),
    "format": lambda rng: _record(rng, _format),
    "flat": _flat,
    "nested": _nested,
    "array": _array,
    "open object": _open,
    "any of": _either,
    "reference": _reference,
    "recursion": _recursive,
}


# ---- other kinds --------------------------------------------------------------------------------

REGEXES = (
    r"[a-z]+@[a-z]{2,8}\.(com|org)",
    r"(yes|no|maybe)",
    r"\d{3}-\d{4}",
    r"#[0-9A-F]{6}",
    r"(é|日本|🙂){1,4}!",
    r"[A-Z][a-z]+(, [A-Z][a-z]+){0,5}\.",
    r"-?(0|[1-9]\d{0,5})(\.\d{1,3})?",
)


def _regex(rng: random.Random) -> Constraint:
    regex = rng.choice(REGEXES)
    pattern = re.compile(regex, re.ASCII)
    return Constraint("regex", "regex", regex, lambda text: pattern.fullmatch(text) is not None)


def _choice(rng: random.Random) -> Constraint:
    choices = rng.sample([word for word in WORDS if word.strip()], rng.randint(1, 5))
    return Constraint("choice", "choice", choices, lambda text: text in choices)


SUM = """\
root ::= term (" " [+-] " " term)*
term ::= number | "(" root ")"
number ::= [0-9] | [1-9] [0-9]
"""
LIST = """\
root ::= "- " word ("\\n- " word)*
word ::= "cat" | "dog" | "fish" | "naïve"
"""
_LINE = re.compile(r"- (cat|dog|fish|naïve)")


def _is_sum(text: str) -> bool:
    while (shorter := re.sub(r"\((\d{1,2}( [+-] \d{1,2})*)\)", "1", text)) != text:
        text = shorter
    return re.fullmatch(r"(\d|[1-9]\d)( [+-] (\d|[1-9]\d))*", text, re.ASCII) is not None


def _is_list(text: str) -> bool:
    return all(_LINE.fullmatch(line) for line in text.split("\n"))


def _grammar(rng: random.Random) -> Constraint:
    if rng.choice((True, False)):
        return Constraint("grammar", "sums in brackets", SUM, _is_sum)
    return Constraint("grammar", "list of words", LIST, _is_list)
