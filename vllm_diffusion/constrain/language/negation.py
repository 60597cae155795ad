"""What a schema excludes, said by what is left; and keywords that say so: not, if and the like.

A negated schema allows only what the schema does not, but not always all of that: what of it cannot
be said is left out. Where nothing is left over, the keyword is refused.
"""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vllm_diffusion.constrain.language.addresses import Schema

TYPES = ("object", "array", "string", "number", "boolean", "null")
CONDITIONS = {"not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"}
NEGATED = "$negated"
"""Marks a schema that names properties and items which it does not evaluate."""
_NOT_OBJECTS = {"type": [kind for kind in TYPES if kind != "object"]}
_DEEPEST = 16
_MOST_PAIRS = 8


class NegationError(Exception):
    """What a schema does not allow cannot be said."""


class Negation:
    """Negates schemas.

    Args:
        resolved: the schema that a reference leads to.
    """

    def __init__(self, resolved: Callable[[str], Schema]) -> None:
        self._resolved = resolved

    def conditions(self, schema: dict[str, Any]) -> list[Schema]:
        """What ``not``, ``if`` and the like of a schema say, in other words: all of these."""
        said: list[Schema] = []
        if "not" in schema:
            said.append(self.negated(schema["not"]))
        if "if" in schema and {"then", "else"} & schema.keys():
            condition, then, other = (
                schema["if"],
                schema.get("then", True),
                schema.get("else", True),
            )
            options: list[Schema] = [{"allOf": [condition, then]}]
            if other is not False:
                options.append({"allOf": [self.negated(condition), other]})
            said.append({"anyOf": options})
        needed = {**schema.get("dependencies", {}), **schema.get("dependentSchemas", {})}
        for name, more in (*needed.items(), *schema.get("dependentRequired", {}).items()):
            also = {"required": more} if isinstance(more, list) else more
            present = {"type": "object", "required": [name]}
            said.append({"anyOf": [{"allOf": [present, also]}, _absent(name), _NOT_OBJECTS]})
        return said

    def negated(self, schema: Schema, depth: int = 0) -> Schema:
        """A schema of what another one does not allow.

        Raises:
            NegationError: it cannot be said.
        """
        if isinstance(schema, bool):
            return not schema
        if depth > _DEEPEST:
            raise NegationError("a schema that is defined by itself")
        options: list[Schema] = []
        left_out: list[str] = []
        for key in schema:
            try:
                options += self._option(key, schema, depth + 1)
            except NegationError as error:
                left_out.append(str(error))
        options = [option for option in options if option is not False]
        if not options and left_out:
            raise NegationError(left_out[0])
        return {"anyOf": options, NEGATED: True} if options else False

    def _option(self, key: str, schema: dict[str, Any], depth: int) -> Iterable[Schema]:
        """What one keyword does not allow."""
        value = schema[key]
        match key:
            case "$ref":
                return [self.negated(self._resolved(value), depth)]
            case "not":
                return [value]
            case "allOf":
                return [self.negated(part, depth) for part in value]
            case "anyOf":
                return [{"allOf": [self.negated(part, depth) for part in value]}]
            case "oneOf":
                return self._not_one(value, depth)
            case "if":
                then, other = schema.get("then", True), schema.get("else", True)
                return [
                    {"allOf": [value, self.negated(then, depth)]},
                    {"allOf": [self.negated(value, depth), self.negated(other, depth)]},
                ]
            case "dependentRequired" | "dependentSchemas" | "dependencies":
                return [
                    {"allOf": [{"type": "object", "required": [name]}, self.negated(also, depth)]}
                    for name, more in value.items()
                    for also in ({"required": more} if isinstance(more, list) else more,)
                ]
            case "properties":
                return [
                    {"type": "object", "required": [name], "properties": {name: other}}
                    for name, part in value.items()
                    if (other := self._or_nothing(part, depth)) is not False
                ]
            case "items" if "prefixItems" not in schema:
                return [{"type": "array", "contains": self.negated(value, depth)}]
            case "contains" if not {"minContains", "maxContains"} & schema.keys():
                return [{"type": "array", "items": self.negated(value, depth)}]
        return _leaf(key, value)

    def _or_nothing(self, part: Schema, depth: int) -> Schema:
        try:
            return self.negated(part, depth)
        except NegationError:
            return False

    def _not_one(self, parts: list[Schema], depth: int) -> list[Schema]:
        """None of the parts, or two of them."""
        pairs = combinations(parts, 2) if len(parts) <= _MOST_PAIRS else ()
        return [
            {"allOf": [self.negated(part, depth) for part in parts]},
            *({"allOf": [*pair]} for pair in pairs),
        ]


def _absent(name: str) -> Schema:
    return {"type": "object", "properties": {name: False}}


_COUNTS = {"Length": "string", "Items": "array", "Properties": "object"}
_BEYOND = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}


def _leaf(key: str, value: Any) -> list[Schema]:
    """What a keyword without schemas in it does not allow."""
    match key:
        case "type":
            kinds = {value} if isinstance(value, str) else {*value}
            if "integer" in kinds:
                kinds.add("number")  # a fraction is left out
            others = [kind for kind in TYPES if kind not in kinds]
            return [{"type": others}] if others else []
        case "const":
            return _other_values([value])
        case "enum":
            return _other_values(value)
        case "required":
            return [_absent(name) for name in value]
        case "pattern":
            return [{"type": "string", "$also": [{"not": {"pattern": value}}]}]
    if key in _BEYOND:
        return [{"type": "number", _BEYOND[key]: value}]
    for what, kind in _COUNTS.items():
        if key == f"min{what}":
            return [{"type": kind, f"max{what}": value - 1}] if value >= 1 else []
        if key == f"max{what}":
            return [{"type": kind, f"min{what}": value + 1}]
    if key in _SILENT:
        return []
    raise NegationError(f"{key!r}")


_SILENT = {
    *("then", "else", "title", "description", "default", "examples", "$comment", "$schema"),
    *("$defs", "definitions", "$id", "$anchor", "deprecated", "readOnly", "writeOnly"),
}


def _other_values(values: list[Any]) -> list[Schema]:
    """Other values than these. Of arrays and objects, only the other types."""
    texts = [value for value in values if isinstance(value, str)]
    numbers = sorted({v for v in values if isinstance(v, int | float) and not isinstance(v, bool)})
    kinds = {"array": list, "object": dict}
    simple = [kind for kind, of in kinds.items() if not any(isinstance(v, of) for v in values)]
    if None not in values:
        simple.append("null")
    options: list[Schema] = [{"type": simple}] if simple else []
    left = [each for each in (True, False) if not any(value is each for value in values)]
    if left:
        options.append({"enum": left})
    string = {"type": "string"}
    options.append({**string, "$also": [{"not": {"enum": texts}}]} if texts else string)
    if not numbers:
        return [*options, {"type": "number"}]
    return [
        *options,
        {"type": "number", "exclusiveMaximum": numbers[0]},
        *(
            {"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high}
            for low, high in pairwise(numbers)
        ),
        {"type": "number", "exclusiveMinimum": numbers[-1]},
    ]
