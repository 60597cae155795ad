"""JSON schemas of several parts -> flat ones: $ref, allOf, anyOf and oneOf resolved.

A flat schema has only keywords about a value's own type. Parts are merged keyword by keyword; where
the meaning of one depends on its neighbours in the same part, merging is refused rather than
guessed at.
"""

from __future__ import annotations

from collections import Counter
from functools import reduce
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from jsonschema import Draft202012Validator

Schema = dict[str, Any] | bool

OF_TYPE = {
    "object": {
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
    },
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
TYPES = ("object", "array", "string", "number", "boolean", "null")
REFUSED = {
    *("not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies"),
    *("contains", "minContains", "maxContains", "$dynamicRef", "$recursiveRef", "$id"),
}
_APPLIED = {"$ref", "allOf", "anyOf", "oneOf"}
# Everything else says nothing about what is valid.
_ASSERTED = {"type", "enum", "const"} | _APPLIED | REFUSED | set().union(*OF_TYPE.values())

# Keywords that look at what stands beside them in the same part.
_LOOKS_AT_NAMES = {"additionalProperties", "unevaluatedProperties"}
_LOOKS_AT_ITEMS = {"items", "unevaluatedItems"}

_LARGER = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_SMALLER = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}

# References within references: deeper ones go round in a circle.
_DEEPEST = 32
_MOST_ALTERNATIVES = 256


class Composition:
    """What the parts of one schema mean together.

    Args:
        root: the whole schema, which references point into.
        problems: where what cannot be resolved is told, in words.
    """

    def __init__(self, root: Schema, problems: list[str]) -> None:
        self._root = root
        self._problems = problems
        self._validator = Draft202012Validator(root)

    def resolved(self, pointer: str) -> Schema:
        """The schema that a JSON pointer, as in ``#/$defs/name``, leads to."""
        if pointer != "#" and not pointer.startswith("#/"):
            self._problems.append(f"$ref {pointer!r} leads outside of the schema")
            return False
        target = _followed(self._root, pointer)
        if not isinstance(target, dict | bool):
            self._problems.append(f"$ref {pointer!r} leads nowhere")
            return False
        return target

    def only_part(self, schema: dict[str, Any], path: str) -> tuple[str, Any] | None:
        """The keyword that a schema consists of, where that is a reference or a choice.

        Such a schema needs no merging, so that it may lead back to itself.
        """
        keywords = asserted(schema)
        if len(keywords) != 1:
            return None
        [(key, value)] = keywords.items()
        if key == "oneOf":
            self._require_apart(value, path)
        if key == "allOf" and len(value) == 1:
            return "anyOf", value
        return (key, value) if key in {"$ref", "anyOf", "oneOf"} else None

    def finite(self, schema: dict[str, Any]) -> list[Any] | None:
        """The values of a schema that lists them, those that its other keywords allow."""
        listed, values = self._listed_by(schema)
        if listed is None:
            return None
        # Every value of a long list is one of the list: not to be looked up in it.
        others = {key: value for key, value in asserted(schema).items() if key != listed}
        if not others:
            return values
        validator = self._validator.evolve(schema=others)
        return [value for value in values if validator.is_valid(value)]

    def _listed_by(self, schema: dict[str, Any]) -> tuple[str | None, list[Any]]:
        """A keyword of a schema that says all values it may have, and these."""
        if "enum" in schema:
            return "enum", list({identity(value): value for value in schema["enum"]}.values())
        if "const" in schema:
            return "const", [schema["const"]]
        for key in ("anyOf", "oneOf"):
            options = [
                self.finite(option) if isinstance(option, dict) else None
                for option in schema.get(key, [None])
            ]
            if all(values is not None for values in options):
                values = [value for values in options for value in values or ()]
                counts = Counter(map(identity, values))
                once = {
                    identity(value): value
                    for value in values
                    if key == "anyOf" or counts[identity(value)] == 1
                }
                return key, list(once.values())
        return None, []

    def alternatives(self, schema: Schema, path: str, depth: int = 0) -> list[Schema]:
        """Schemas without parts, one of which a valid value fits; any such value is valid."""
        if isinstance(schema, bool):
            return [schema] if schema else []
        own = {key: value for key, value in asserted(schema).items() if key not in _APPLIED}
        if own.keys() == asserted(schema).keys():
            return [schema]
        if depth > _DEEPEST:
            self._problems.append(f"{path} is defined by itself")
            return []
        parts: list[list[Schema]] = [[own or True]]
        if "$ref" in schema:
            parts.append([self.resolved(schema["$ref"])])
        parts += [[part] for part in schema.get("allOf", [])]
        parts += [schema[key] for key in ("anyOf", "oneOf") if key in schema]
        flat = [
            [one for part in options for one in self.alternatives(part, path, depth + 1)]
            for options in parts
        ]
        if "oneOf" in schema:
            self._require_apart(schema["oneOf"], path)
        return reduce(lambda left, right: self._products(left, right, path), flat)

    def strings(self, naming: Schema, path: str) -> Schema:
        """A schema for names, which are strings whatever it says."""
        merged = self._merged({"type": "string"}, naming, path)
        return {**naming, "type": "string"} if isinstance(naming, dict) else merged

    def _products(self, left: list[Schema], right: list[Schema], path: str) -> list[Schema]:
        if len(left) * len(right) > _MOST_ALTERNATIVES:
            self._problems.append(f"{path} has too many combinations of alternatives")
            return []
        products = [self._merged(one, other, path) for one in left for other in right]
        return [product for product in products if product is not False]

    def _merged(self, one: Schema, other: Schema, path: str) -> Schema:
        """What satisfies both of two flat schemas."""
        if isinstance(one, bool) or isinstance(other, bool):
            return (one and other) if isinstance(one, bool) else (other and one)
        one, other = _listed(asserted(one)), _listed(asserted(other))
        if not _independent(one, other) or not _independent(other, one):
            self._problems.append(
                f"{path} is made of parts one of which closes an object or array that another fills"
            )
        merged = dict(one)
        for key, value in other.items():
            if key in merged and merged[key] != value:
                merged[key] = self._both(key, merged[key], value, path)
            else:
                merged[key] = value
        return False if merged.get("type") == [] else merged

    def _both(self, key: str, one: Any, other: Any, path: str) -> Any:
        """A keyword that says what two of its values say."""
        if key in _LARGER:
            return max(one, other)
        if key in _SMALLER:
            return min(one, other)
        match key:
            case "type":
                return _common_types(one, other)
            case "required":
                return [*one, *(name for name in other if name not in one)]
            case "properties":
                both = {name: {"allOf": [one[name], other[name]]} for name in one if name in other}
                return {**one, **other, **both}
            case "items" | "additionalProperties" | "propertyNames":
                return {"allOf": [one, other]}
            case "uniqueItems":
                return True
            case "enum":
                known = set(map(identity, other))
                return [value for value in one if identity(value) in known]
        self._problems.append(f"{path} is made of parts with different {key!r}")
        return one

    def _require_apart(self, options: list[Schema], path: str) -> None:
        """Refuse ``oneOf`` unless no value fits two options."""
        finite = [self.finite(each) if isinstance(each, dict) else None for each in options]
        values = [value for values in finite for value in values or ()]
        if len(set(map(identity, values))) < len(values):
            self._problems.append(f"{path}/oneOf: a value stands in two options")
        flat = [self.alternatives(option, path) for option in options]
        for (i, left), (j, right) in combinations(enumerate(flat), 2):
            if finite[i] is not None and finite[j] is not None:
                continue
            if not all(self._apart(one, other) for one in left for other in right):
                self._problems.append(
                    f"{path}/oneOf: a value may fit options {i} and {j} (say anyOf, or tell them "
                    "apart by type or by a required property with different constants)"
                )

    def _apart(self, one: Schema, other: Schema, *, deep: bool = True) -> bool:
        """Whether it is plain that no value fits two flat schemas."""
        if isinstance(one, bool) or isinstance(other, bool):
            return one is False or other is False
        for values, schema in ((self.finite(one), other), (self.finite(other), one)):
            if values is not None:
                validator = self._validator.evolve(schema=schema)
                return not any(map(validator.is_valid, values))
        if "type" not in one or "type" not in other:
            return False
        common = _common_types(one["type"], other["type"])
        if common and set(common) != {"object"}:
            return False
        return not common or (deep and self._members_apart(one, other))

    def _members_apart(self, one: dict[str, Any], other: dict[str, Any]) -> bool:
        """Whether two schemas of objects require a member that cannot be the same in both."""
        for name in set(one.get("required", [])) & set(other.get("required", [])):
            kinds = [schema.get("properties", {}).get(name, True) for schema in (one, other)]
            left, right = (self.alternatives(kind, name) for kind in kinds)
            if all(self._apart(a, b, deep=False) for a in left for b in right):
                return True
        return False


def circular(root: Schema) -> set[str]:
    """The references of a schema that lead back to themselves."""
    leads = {pointer: _references(_followed(root, pointer)) for pointer in _references(root)}
    found = set()
    for start, first in leads.items():
        pending = [*first]
        seen = {*pending}
        for pointer in pending:
            more = leads[pointer] - seen
            seen |= more
            pending += more
        if start in seen:
            found.add(start)
    return found


def _references(schema: Any) -> set[str]:
    """Every ``$ref`` in a schema."""
    found: set[str] = set()
    pending = [schema]
    for part in pending:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                found.add(part["$ref"])
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    return found


def _followed(root: Any, pointer: str) -> Any:
    """What a JSON pointer leads to; None: nothing."""
    target = root
    for part in unquote(pointer).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            target = target[int(key) if isinstance(target, list) else key]
        except (LookupError, TypeError, ValueError):
            return None
    return target


def asserted(schema: dict[str, Any]) -> dict[str, Any]:
    """The keywords that say what is valid."""
    return {key: value for key, value in schema.items() if key in _ASSERTED}


def _listed(schema: dict[str, Any]) -> dict[str, Any]:
    """The same, a constant written as a list of values."""
    if "const" not in schema:
        return schema
    const = identity(schema["const"])
    values = [each for each in schema.get("enum", [schema["const"]]) if identity(each) == const]
    return {**{key: value for key, value in schema.items() if key != "const"}, "enum": values}


def identity(value: Any) -> Any:
    """What is equal for equal JSON values; true is not 1, and 1.0 is."""
    match value:
        case bool():
            return "boolean", value
        case dict():
            return "object", frozenset((name, identity(each)) for name, each in value.items())
        case list():
            return "array", tuple(map(identity, value))
    return value


def _common_types(one: str | list[str], other: str | list[str]) -> list[str]:
    ones, others = ([kind] if isinstance(kind, str) else kind for kind in (one, other))
    common = [kind for kind in ones if kind in others]
    for left, right in ((ones, others), (others, ones)):
        if "integer" in left and "number" in right and "integer" not in common:
            common.append("integer")
    return common


def _independent(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether what ``one`` says of the rest of a value leaves out nothing that ``other`` names."""
    names = set(other.get("properties", {})) - set(one.get("properties", {}))
    closes_names = any(one.get(key, True) is not True for key in _LOOKS_AT_NAMES)
    closes_items = any(one.get(key, True) is not True for key in _LOOKS_AT_ITEMS)
    return not (
        (closes_names and (names or "patternProperties" in other))
        or (closes_items and len(other.get("prefixItems", [])) > len(one.get("prefixItems", [])))
    )
