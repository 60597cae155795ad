"""Tool calls as Gemma 4 writes them, as a grammar.

    <|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>

Takes functions with the JSON schemas of their arguments. Gives EBNF in xgrammar's form: special
tokens stand there by their ids, as Token(48). Arguments are not JSON: names are bare and in
alphabetical order, as the chat template writes them, strings stand between special tokens and
escape nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_RULES: Final = r"""
value ::= string | number | "true" | "false" | "null" | object | array
object ::= "{" (name ":" value ("," name ":" value)*)? "}"
array ::= "[" (value ("," value)*)? "]"
name ::= [a-zA-Z_] [a-zA-Z0-9_.-]{0,63}
integer ::= "-"? ("0" | [1-9] [0-9]{0,14})
number ::= integer ("." [0-9]{1,15})? ([eE] [+-]? [0-9]{1,2})?
character ::= [^<] | "<" [^|<]
anything ::= [^\0]*
"""
"""What every grammar may call. A string cannot spell the token that ends it: no ``<|`` in it."""

_SAID: Final = {
    "type", "enum", "const", "anyOf", "oneOf", "$ref", "properties", "required", "items",
    "minItems", "maxItems", "minLength", "maxLength", "allOf",
}  # fmt: skip
"""Keywords that the grammar keeps."""

_SILENT: Final = {
    "title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions",
    "additionalProperties", "strict", "deprecated", "readOnly", "writeOnly", "$comment",
}  # fmt: skip
"""Keywords that say nothing about what may be written, or what the grammar does anyway."""

_SIMPLE: Final = {
    "integer": "integer",
    "number": "number",
    "boolean": '("true" | "false")',
    "null": '"null"',
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A tool that may be called."""

    name: str
    parameters: Mapping[str, Any] | None
    """JSON schema of the arguments; None: anything."""
    strict: bool
    """All of the schema must be kept, or the tool is refused; else as much as possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTokens:
    """The special tokens of a call, as ids."""

    begin: int
    end: int
    quote: int


def call_grammar(
    functions: Sequence[Function], tokens: CallTokens, *, required: bool, several: bool
) -> str:
    """The EBNF of an answer that calls tools.

    Args:
        functions: those that may be called; at least one.
        tokens: of the tokenizer.
        required: the answer is a call; else it may be text, and calls in it.
        several: more than one call may stand there.

    Raises:
        ConstraintError: a strict tool's schema says what the grammar cannot.
    """
    writer = _Writer(tokens)
    calls = " | ".join(writer.call(function) for function in functions)
    some = "call+" if several else "call"
    if required:
        root = some
    else:
        root = "anything (call anything)*" if several else "anything (call anything)?"
    quoted = f"Token({tokens.quote})"
    return "\n".join(
        [
            f"root ::= {root}",
            f'call ::= Token({tokens.begin}) "call:" ({calls}) Token({tokens.end})',
            f"string ::= {quoted} character* {quoted}",
            *(f"{name} ::= {body}" for name, body in writer.rules.items()),
            _RULES.strip(),
        ]
    )


class _Writer:
    """Rules for the schemas of some tools."""

    def __init__(self, tokens: CallTokens) -> None:
        self.rules: dict[str, str] = {}
        self._quote = f"Token({tokens.quote})"
        self._named: dict[tuple[int, str], str] = {}
        self._root: Mapping[str, Any] = {}
        self._strict = False

    def call(self, function: Function) -> str:
        """What stands between the name and the end of a call."""
        schema = function.parameters
        self._root, self._strict = schema or {}, function.strict
        arguments = "object"
        if schema is not None and schema.get("type", "object") == "object":
            arguments = self._value(schema, "parameters") if schema.get("properties") else '"{}"'
        return f"{_text(function.name)} {arguments}"

    def _value(self, schema: Any, path: str) -> str:
        """An expression for the values that a schema allows."""
        if not isinstance(schema, dict):
            return "value"
        unknown = sorted(schema.keys() - _SAID - _SILENT)
        if unknown and self._strict:
            raise ConstraintError(
                f"A strict tool's {path} uses {', '.join(unknown)}, which calls in Gemma's form "
                'are not held to: leave it out, or set "strict" to false.'
            )
        if "$ref" in schema:
            return self._reference(str(schema["$ref"]), path)
        if "const" in schema or "enum" in schema:
            values = schema["enum"] if "enum" in schema else [schema["const"]]
            return self._either(self._literal(value) for value in values)
        for several in ("anyOf", "oneOf", "allOf"):
            options = schema.get(several)
            if isinstance(options, list) and options and (several != "allOf" or len(options) == 1):
                return self._either(self._value(option, f"{path}.{several}") for option in options)
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds is None:
            return "value"
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return self._either(self._typed(kind, schema, path) for kind in kinds)

    def _typed(self, kind: str, schema: Mapping[str, Any], path: str) -> str:
        if kind == "string":
            return self._string(schema)
        if kind == "array":
            return self._array(schema, path)
        if kind == "object":
            properties = schema.get("properties")
            return self._object(properties, schema, path) if properties else "object"
        return _SIMPLE.get(kind, "value")

    def _string(self, schema: Mapping[str, Any]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        if not least and most is None:
            return "string"
        times = f"{{{least},{'' if most is None else most}}}"
        # A character a place, so that lengths are right; "<" would need two.
        return f"({self._quote} [^<]{times} {self._quote})"

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        item = self._value(schema.get("items", True), f"{path}.items")
        if most == 0:
            return '"[]"'
        behind = f"{{{max(least - 1, 0)},{'' if most is None else int(most) - 1}}}"
        items = f'{item} ("," {item}){behind}'
        return f'("[" {items} "]")' if least else f'("[" ({items})? "]")'

    def _object(self, properties: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> str:
        required = set(schema.get("required", ()))
        rule = self._new_rule("object")
        # From the last property to the first: behind another one, and as the first of all.
        behind = first = '""'
        for name in sorted(properties, key=str.lower, reverse=True):
            if ":" in name:
                raise ConstraintError(f"A tool cannot have a parameter called {name!r}.")
            pair = f"{_text(name + ':')} {self._value(properties[name], f'{path}.{name}')}"
            alone, following = self._new_rule("first"), self._new_rule("rest")
            optional = name not in required
            self.rules[alone] = f"{pair} {behind}" + (f" | {first}" if optional else "")
            some = f'("," {pair})?' if optional else f'"," {pair}'
            self.rules[following] = f"{some} {behind}"
            first, behind = alone, following
        self.rules[rule] = f'"{{" {first} "}}"'
        return rule

    def _reference(self, pointer: str, path: str) -> str:
        known = self._named.get((id(self._root), pointer))
        if known is not None:
            return known
        target: Any = self._root
        for part in pointer.removeprefix("#").strip("/").split("/"):
            if part:
                key = part.replace("~1", "/").replace("~0", "~")
                target = target.get(key) if isinstance(target, dict) else None
        if not pointer.startswith("#") or target is None:
            raise ConstraintError(f"A tool's {path} refers to {pointer!r}, which is not there.")
        rule = self._named[id(self._root), pointer] = self._new_rule("named")
        self.rules[rule] = self._value(target, pointer)
        return rule

    def _literal(self, value: Any) -> str:
        """One value as the chat template writes it."""
        if isinstance(value, str):
            return f"({self._quote} {_text(value)} {self._quote})" if value else self._quote * 2
        if isinstance(value, dict):
            pairs = (
                f"{_text(name + ':')} {self._literal(value[name])}"
                for name in sorted(value, key=str.lower)
            )
            return f'("{{" {_listed(pairs)} "}}")'
        if isinstance(value, list):
            return f'("[" {_listed(map(self._literal, value))} "]")'
        return _text(json.dumps(value))

    def _new_rule(self, kind: str) -> str:
        name = f"{kind}_{len(self.rules)}"
        self.rules[name] = '""'
        return name

    @staticmethod
    def _either(options: Any) -> str:
        return f"({' | '.join(dict.fromkeys(options))})"


def _listed(parts: Any) -> str:
    return ' "," '.join(parts) or '""'


def _text(value: str) -> str:
    """A literal in EBNF; every escape of JSON is one there."""
    return json.dumps(value, ensure_ascii=False)
