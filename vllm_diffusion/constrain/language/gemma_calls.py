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

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from vllm_diffusion.constrain.language.formats import FORMATS, UNSUPPORTED
from vllm_diffusion.constrain.language.gemma_text import matching, number
from vllm_diffusion.constrain.language.syntax import text
from vllm_diffusion.constrain.language.written import MOST_TIMES, expression
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vllm_diffusion.constrain.language.syntax import Node

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
    "minItems", "maxItems", "minLength", "maxLength", "allOf", "pattern", "format", "prefixItems",
    "additionalProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf",
}  # fmt: skip
"""Keywords that the grammar keeps."""

_SILENT: Final = {
    "title", "description", "default", "examples", "$schema", "$id", "$defs", "definitions",
    "strict", "deprecated", "readOnly", "writeOnly", "$comment",
}  # fmt: skip
"""Keywords that say nothing about what may be written, or what the grammar does anyway."""

_BOUNDS: Final = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
}  # fmt: skip

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
        ConstraintError: a strict tool's schema says what the grammar cannot, or a tool's schema
            what nobody could.
    """
    writer = _Writer(tokens)
    try:
        calls = " | ".join(writer.call(function) for function in functions)
    except RecursionError as error:
        raise ConstraintError("A tool's parameters nest too deep.") from error
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
        if schema is not None and self._makes_sense(schema) and _of_object(schema):
            arguments = self._value(schema, "parameters") if schema.get("properties") else '"{}"'
        return f"{_text(function.name)} {arguments}"

    def _makes_sense(self, schema: Mapping[str, Any]) -> bool:
        try:
            Draft202012Validator.check_schema(schema)
        except SchemaError as error:
            if self._strict:
                raise ConstraintError(
                    f"A strict tool's parameters are not a JSON schema: {error.message}."
                ) from error
            return False
        return True

    def _kept(self, node: Callable[[], Node], path: str) -> str | None:
        """An expression; None for what a tool that is not strict asks and nobody can keep."""
        try:
            return expression(node())
        except ConstraintError as error:
            if not self._strict:
                return None
            reason = str(error).removesuffix(".")
            raise ConstraintError(
                f"A strict tool's {path} cannot be kept: {reason}. Change it, or set "
                '"strict" to false.'
            ) from error

    def _counts(self, schema: Mapping[str, Any], what: str, path: str) -> tuple[int, int | None]:
        """Fewest and most of something; any where a loose tool's contradict."""
        least, most = int(schema.get(f"min{what}", 0)), schema.get(f"max{what}")
        if least > MOST_TIMES:
            raise ConstraintError(f"A tool's {path} has min{what} {least}: no answer is so long.")
        if most is not None and least > most:
            if self._strict:
                raise ConstraintError(
                    f"A strict tool's {path} has min{what} {least} above max{what} {int(most)}."
                )
            return 0, None
        return least, None if most is None or most > MOST_TIMES else int(most)

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
            return self._values(values)
        for several in ("anyOf", "oneOf", "allOf"):
            options = schema.get(several)
            if several != "allOf" and (values := _constants(options)):
                return self._values(values)
            if isinstance(options, list) and options and (several != "allOf" or len(options) == 1):
                return self._either(self._value(option, f"{path}.{several}") for option in options)
        kinds = schema.get("type", "object" if "properties" in schema else None)
        if kinds is None:
            return "value"
        kinds = kinds if isinstance(kinds, list) else [kinds]
        return self._either(self._typed(kind, schema, path) for kind in kinds)

    def _typed(self, kind: str, schema: Mapping[str, Any], path: str) -> str:
        if kind == "string":
            return self._string(schema, path)
        if kind == "array":
            return self._array(schema, path)
        if kind == "object":
            properties = schema.get("properties")
            return (
                self._object(properties, schema, path) if properties else self._open(schema, path)
            )
        if kind in {"integer", "number"} and _BOUNDS & schema.keys():
            kept = self._kept(lambda: number(schema, whole=kind == "integer"), path)
            return kept or _SIMPLE[kind]
        return _SIMPLE.get(kind, "value")

    def _open(self, schema: Mapping[str, Any], path: str) -> str:
        """An object that names no properties."""
        others = schema.get("additionalProperties", True)
        if others is True:
            return "object"
        if others is False:
            return '"{}"'
        pair = f'name ":" {self._value(others, f"{path}.additionalProperties")}'
        return f'("{{" ({pair} ("," {pair})*)? "}}")'

    def _string(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = self._counts(schema, "Length", path)
        if schema.get("format") not in {None, *FORMATS, *UNSUPPORTED}:  # says nothing
            schema = {key: value for key, value in schema.items() if key != "format"}
        if {"pattern", "format"} & schema.keys():
            kept = self._kept(lambda: matching(schema), path)
            if kept is not None:
                return f"({self._quote} {kept} {self._quote})"
        if not least and most is None:
            return "string"
        times = f"{{{least},{'' if most is None else most}}}"
        # A character a place, so that lengths are right; "<" would need two.
        return f"({self._quote} [^<]{times} {self._quote})"

    def _array(self, schema: Mapping[str, Any], path: str) -> str:
        least, most = self._counts(schema, "Items", path)
        if "prefixItems" in schema:
            return self._tuple(schema, path, least, most)
        item = self._value(schema.get("items", True), f"{path}.items")
        if most == 0:
            return '"[]"'
        behind = f"{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        items = f'{item} ("," {item}){behind}'
        return f'("[" {items} "]")' if least else f'("[" ({items})? "]")'

    def _tuple(self, schema: Mapping[str, Any], path: str, least: int, most: int | None) -> str:
        """An array whose first items are told apart; without ``items`` it has no others."""
        if schema.get("items", False) is not False:
            if self._strict:
                raise ConstraintError(
                    f"A strict tool's {path} has items behind prefixItems, which calls in Gemma's "
                    "form are not held to."
                )
            return "array"
        content = ""
        prefix = list(enumerate(schema["prefixItems"]))[:most]
        if least > len(prefix):
            if self._strict:
                raise ConstraintError(f"A strict tool's {path} asks for more items than it has.")
            return "array"
        for index, item in reversed(prefix):
            part = self._value(item, f"{path}.prefixItems.{index}")
            content = f"""{'"," ' if index else ""}{part} {content}"""
            content = content if index < least else f"({content})?"
        return f'("[" {content} "]")'

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

    def _values(self, values: Sequence[Any]) -> str:
        """One of some values; the quotes stand once around all texts among them."""
        texts = [_text(value) for value in dict.fromkeys(v for v in values if isinstance(v, str))]
        others = [self._literal(value) for value in values if not isinstance(value, str)]
        if texts:
            others.append(f"({self._quote} ({' | '.join(texts)}) {self._quote})")
        return self._either(others)

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
        try:
            return _text(json.dumps(value, allow_nan=False))
        except ValueError as error:
            raise ConstraintError(
                f"A tool's value {value!r} cannot be written: {error}."
            ) from error

    def _new_rule(self, kind: str) -> str:
        name = f"{kind}_{len(self.rules)}"
        self.rules[name] = '""'
        return name

    @staticmethod
    def _either(options: Any) -> str:
        return f"({' | '.join(dict.fromkeys(options))})"


def _constants(options: Any) -> list[Any]:
    """The values of options that are constants and nothing else; none where one is more."""
    values = [
        each["const"]
        for each in options or ()
        if isinstance(each, dict) and "const" in each and not each.keys() - _SILENT - {"const"}
    ]
    return values if len(values) == len(options or ()) else []


def _of_object(schema: Mapping[str, Any]) -> bool:
    return bool(schema.get("type", "object") == "object")


def _listed(parts: Any) -> str:
    return ' "," '.join(parts) or '""'


def _text(value: str) -> str:
    """A literal in EBNF; every escape of JSON is one there."""
    text(value)  # refuses what UTF-8 cannot spell
    return json.dumps(value, ensure_ascii=False)
