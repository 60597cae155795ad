"""JSON schemas of several parts -> flat ones: $ref, allOf, anyOf and oneOf resolved.

A flat schema has only keywords about a value's own type. Parts are merged keyword by keyword; where
the meaning of one depends on its neighbours in the same part, merging is refused rather than
guessed at.
"""

from __future__ import annotations

from collections import Counter
from functools import reduce
from itertools import combinations
from math import lcm
from typing import Any

from jsonschema import Draft202012Validator
from referencing.exceptions import Unresolvable

from vllm_diffusion.constrain.language.addresses import Schema, followed
from vllm_diffusion.constrain.language.negation import (
    CONDITIONS,
    NEGATED,
    Negation,
    NegationError,
)

OF_TYPE = {
    "object": {
        *("properties", "required", "additionalProperties", "patternProperties"),
        *("propertyNames", "minProperties", "maxProperties", "unevaluatedProperties"),
    },
    "array": {
        *("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"),
        *("contains", "minContains", "maxContains"),
    },
    "string": {"minLength", "maxLength", "pattern", "format", "$also"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
REFUSED = {"$dynamicRef", "$recursiveRef", "$id"}
_APPLIED = {"$ref", "allOf", "anyOf", "oneOf"} | CONDITIONS
# Everything else says nothing about what is valid.
_ASSERTED = {"type", "enum", "const"} | _APPLIED | REFUSED | {NEGATED}
_ASSERTED = _ASSERTED.union(*OF_TYPE.values())

# Keywords that look at what stands beside them in the same part.
_LOOKS_AT_NAMES = {"additionalProperties"}
_LOOKS_AT_ITEMS = {"items"}

_LARGER = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
_SMALLER = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}

# What is left to say of what no part speaks of -> the keyword that says so of a flat schema.
_EVALUATED = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}

# References within references: deeper ones go round in a circle.
_DEEPEST = 32
_MOST_ALTERNATIVES = 256
_MOST_LOOKED_AT = 100_000


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
        self._looked_at = 0
        self._negation = Negation(self.resolved)

    def resolved(self, pointer: str) -> Schema:
        """The schema that a JSON pointer, as in ``#/$defs/name``, leads to."""
        if pointer != "#" and not pointer.startswith("#/"):
            self._problems.append(f"$ref {pointer!r} leads outside of the schema")
            return False
        target = followed(self._root, pointer)
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
            return "anyOf", self._one_of(value, path)
        if key == "allOf" and len(value) == 1:
            return "anyOf", value
        return (key, value) if key in {"$ref", "anyOf"} else None

    def finite(self, schema: dict[str, Any]) -> list[Any] | None:
        """The values of a schema that lists them, those that its other keywords allow."""
        listed, values = self._listed_by(schema)
        if listed is None:
            return None
        # Every value of a long list is one of the list: not to be looked up in it.
        others = {key: value for key, value in asserted(schema).items() if key != listed}
        if not others:
            return values
        return [value for value in values if self.may_be(_plain(others), value)]

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
            return [_closed(schema, schema)] if _EVALUATED.keys() & own.keys() else [schema]
        self._looked_at += 1
        if depth > _DEEPEST or self._looked_at > _MOST_LOOKED_AT:
            self._problems.append(f"{path} is defined by itself")
            return []
        # What parts evaluate is known when they are one.
        late = {key: own.pop(key) for key in _EVALUATED if key in own}
        parts: list[list[Schema]] = [[own or True]]
        if "$ref" in schema:
            parts.append([self.resolved(schema["$ref"])])
        parts += [[part] for part in (*schema.get("allOf", []), *self._conditions(schema, path))]
        if "anyOf" in schema:
            parts.append(schema["anyOf"])
        if "oneOf" in schema:
            parts.append(self._one_of(schema["oneOf"], path))
        flat = [
            [one for part in options for one in self.alternatives(part, path, depth + 1)]
            for options in parts
        ]
        merged = reduce(lambda left, right: self._products(left, right, path), flat)
        return [self._evaluated(each, late, path) for each in merged] if late else merged

    def _evaluated(self, schema: Schema, late: dict[str, Any], path: str) -> Schema:
        """A flat schema with what its ``unevaluated`` keywords say of the rest."""
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        if NEGATED in schema:
            self._problems.append(f"{path} has {next(iter(late))!r} beside a negation")
        return _closed(schema, late)

    def _conditions(self, schema: dict[str, Any], path: str) -> list[Schema]:
        try:
            return self._negation.conditions(schema)
        except NegationError as error:
            keys = " and ".join(repr(key) for key in schema if key in CONDITIONS)
            self._problems.append(f"{path} has {keys}, and what {error} excludes cannot be said")
            return [False]

    def names(self, naming: Schema, also: list[Any], path: str) -> Schema:
        """A schema for names, which are strings whatever it says, with more to obey."""
        string: dict[str, Any] = {"type": "string", **({"$also": also} if also else {})}
        return (
            string
            if naming is True
            else {"anyOf": self._products([string], self.alternatives(naming, path), path)}
        )

    def may_be(self, naming: Schema, value: Any) -> bool:
        """Whether a value is valid for a schema."""
        try:
            return naming is True or bool(self._validator.evolve(schema=naming).is_valid(value))
        except Unresolvable as error:
            self._problems.append(f"$ref {error.ref!r} leads nowhere")
            return False

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
        if not (_independent(one, other) and _independent(other, one)):
            one, other = _filled(one, other), _filled(other, one)
        if not (_independent(one, other) and _independent(other, one)):
            self._problems.append(
                f"{path} is made of parts one of which closes an object or array that another fills"
            )
        merged = dict(one)
        for key, value in other.items():
            if key in {"pattern", "format"} and merged.get(key, value) != value:
                more = [{key: value}]
                merged["$also"] = self._both("$also", merged.get("$also", []), more, path)
            elif key in merged and merged[key] != value:
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
            case "properties" | "patternProperties":
                both = {name: {"allOf": [one[name], other[name]]} for name in one if name in other}
                return {**one, **other, **both}
            case "items" | "additionalProperties" | "propertyNames":
                return {"allOf": [one, other]}
            case "prefixItems":
                longer = one if len(one) > len(other) else other
                parts = [{"allOf": [*pair]} for pair in zip(one, other, strict=False)]
                return [*parts, *longer[len(parts) :]]
            case "multipleOf" if float(one).is_integer() and float(other).is_integer():
                return lcm(int(one), int(other))
            case "uniqueItems" | "$negated":
                return True
            case "$also":
                return [*one, *(each for each in other if each not in one)]
            case "enum":
                known = set(map(identity, other))
                return [value for value in one if identity(value) in known]
        self._problems.append(f"{path} is made of parts with different {key!r}")
        return one

    def _one_of(self, options: list[Schema], path: str) -> list[Schema]:
        """Options of which a value fits one: each without those that it may have in common."""
        finite = [self.finite(each) if isinstance(each, dict) else None for each in options]
        counts = Counter(identity(value) for values in finite for value in values or ())
        flat = [self.alternatives(option, path) for option in options]
        others: list[list[Schema]] = [[] for _ in options]
        for (i, left), (j, right) in combinations(enumerate(flat), 2):
            both_listed = finite[i] is not None and finite[j] is not None
            if both_listed and max(counts.values(), default=1) == 1:
                continue
            if all(self._apart(one, other) for one in left for other in right):
                continue
            try:
                others[i].append(self._negation.negated(options[j]))
                others[j].append(self._negation.negated(options[i]))
            except NegationError:
                self._problems.append(
                    f"{path}/oneOf: a value may fit options {i} and {j} (say anyOf, or tell them "
                    "apart by type or by a required property with different constants)"
                )
        return [
            {"allOf": [option, *more]} if more else option
            for option, more in zip(options, others, strict=True)
        ]

    def _apart(self, one: Schema, other: Schema, *, deep: bool = True) -> bool:
        """Whether it is plain that no value fits two flat schemas."""
        if isinstance(one, bool) or isinstance(other, bool):
            return one is False or other is False
        for values, schema in ((self.finite(one), other), (self.finite(other), one)):
            if values is not None:
                return not any(self.may_be(_plain(schema), value) for value in values)
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


def _plain(schema: Schema) -> Schema:
    """A flat schema as a validator reads it."""
    if isinstance(schema, bool) or "$also" not in schema:
        return schema
    others = {key: value for key, value in schema.items() if key != "$also"}
    return {**others, "allOf": schema["$also"]}


def _closed(schema: dict[str, Any], late: dict[str, Any]) -> Schema:
    """A flat schema that says of the rest what ``unevaluated`` keywords do."""
    rest = {_EVALUATED[key]: late[key] for key in _EVALUATED if key in late}
    return {**rest, **{key: value for key, value in schema.items() if key not in _EVALUATED}}


def _filled(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The same schema, with what it says of the rest said of the names and places of another."""
    missing = len(other.get("prefixItems", ())) - len(one.get("prefixItems", ()))
    if "items" in one and missing > 0:
        one = {**one, "prefixItems": [*one.get("prefixItems", ()), *[one["items"]] * missing]}
    names = [name for name in other.get("properties", {}) if name not in one.get("properties", {})]
    if "additionalProperties" not in one or not names or "patternProperties" in one:
        return one
    return {
        **one,
        "properties": {
            **one.get("properties", {}),
            **dict.fromkeys(names, one["additionalProperties"]),
        },
    }


def _independent(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether what ``one`` says of the rest of a value leaves out nothing that ``other`` names."""
    names = set(other.get("properties", {})) - set(one.get("properties", {}))
    closes_names = any(one.get(key, True) is not True for key in _LOOKS_AT_NAMES)
    closes_items = any(one.get(key, True) is not True for key in _LOOKS_AT_ITEMS)
    return not (
        (closes_names and (names or "patternProperties" in other))
        or (closes_items and len(other.get("prefixItems", [])) > len(one.get("prefixItems", [])))
    )
