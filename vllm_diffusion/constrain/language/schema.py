"""JSON schema -> grammar. Sound: what the grammar reads is valid, or the schema is refused.

Members come in the order of ``properties``. What a schema leaves open is closed where a writer
would only ramble: an object with ``properties`` has no others unless ``additionalProperties`` says
so, an array with ``prefixItems`` no others without ``items``, and keywords of one type imply it.
``compose`` brings schemas of several parts to this form first.
"""

from __future__ import annotations

import json
import re
from itertools import product
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from vllm_diffusion.constrain.language import json_text as write
from vllm_diffusion.constrain.language.addresses import Schema, circular, located
from vllm_diffusion.constrain.language.arrays import containing, distinct
from vllm_diffusion.constrain.language.compose import (
    OF_TYPE,
    REFUSED,
    Composition,
    identity,
)
from vllm_diffusion.constrain.language.negation import TYPES
from vllm_diffusion.constrain.language.numeric import between, bounds
from vllm_diffusion.constrain.language.regular import Multiples, together
from vllm_diffusion.constrain.language.strings import text_of
from vllm_diffusion.constrain.language.syntax import (
    EMPTY,
    NOTHING,
    Call,
    Choice,
    Grammar,
    Node,
    Repeat,
    choice,
    sequence,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_diffusion.constrain.language.numeric import Bound

ANY_VALUE, ANY_ARRAY, ANY_OBJECT = "any value", "any array", "any object"


def json_schema(
    schema: str, *, any_whitespace: bool = True, whitespace_pattern: str | None = None
) -> Grammar:
    """The grammar of a JSON schema.

    Args:
        schema: its text; draft 2020-12, as far as a draft matters.
        any_whitespace: between the parts of a value the white space of a pretty printer; else none.
        whitespace_pattern: a regular expression for that white space, instead.

    Raises:
        ConstraintError: it is no schema, or says what is not supported; all problems by path.
    """
    try:
        parsed = json.loads(schema, parse_constant=_no_number)
        Draft202012Validator.check_schema(parsed)
    except SchemaError as error:
        where = error.json_path.replace("$", "#", 1)
        raise ConstraintError(f"This is not a JSON schema: at {where}, {error.message}.") from error
    except ValueError as error:
        raise ConstraintError(f"This is not a JSON schema: {error}.") from error
    try:
        layout = write.Layout(any_whitespace=any_whitespace, pattern=whitespace_pattern)
        return _Translation(located(parsed), layout).grammar()
    except RecursionError as error:
        raise ConstraintError(
            "The JSON schema nests too deep, or merges a part with itself without end."
        ) from error


_MOST_PATTERNS = 3
_MOST_CONTAINED = 9
_MOST_COUNTED = 100
_LARGEST_STEP = 1000
_LARGEST_DENOMINATOR = 1024


class _Translation:
    """One schema's rules: of any value, of what is referred to, of the members of objects."""

    def __init__(self, root: Schema, layout: write.Layout) -> None:
        self._layout = layout
        self._problems: list[str] = []
        self._compose = Composition(root, self._problems)
        self._circular = circular(root)
        self._rules: dict[str, Node] = layout.any_rules(ANY_VALUE, ANY_ARRAY, ANY_OBJECT)

    def grammar(self) -> Grammar:
        root = self._reference("#")
        if self._problems:
            problems = "; ".join(dict.fromkeys(self._problems))
            raise ConstraintError(f"The JSON schema cannot be followed exactly: {problems}.")
        return Grammar(self._rules, root.rule)

    def _reference(self, pointer: str) -> Call:
        """A call of the rule of what a reference names, which is translated once a depth."""
        outer = self._layout
        if pointer in self._circular:
            self._layout = outer.at(None)
        depth = self._layout.depth
        name = f"{pointer} at {depth}" if depth else pointer
        if name not in self._rules:
            self._rules[name] = NOTHING  # the schema may refer to itself
            self._rules[name] = self._node(self._compose.resolved(pointer), pointer)
        self._layout = outer
        return Call(name)

    def _node(self, schema: Schema, path: str) -> Node:
        """What one schema reads."""
        if schema is True:
            return Call(ANY_VALUE)
        if schema is False:
            return NOTHING
        values = self._compose.finite(schema)
        if values is not None:
            return Choice(tuple(map(self._layout.value, values)))
        match self._compose.only_part(schema, path):
            case "$ref", pointer:
                return self._reference(pointer)
            case key, options:
                parts = enumerate(options)
                return Choice(tuple(self._node(each, f"{path}/{key}/{n}") for n, each in parts))
        schemas = self._compose.alternatives(schema, path)
        if schemas != [schema]:
            return Choice(tuple(self._node(each, path) for each in schemas))
        self._problems += [f"{path} has {key!r}" for key in schema if key in REFUSED]
        return Choice(tuple(self._typed(kind, schema, path) for kind in _types(schema)))

    def _typed(self, kind: str, schema: dict[str, Any], path: str) -> Node:
        match kind:
            case "object" | "array":
                content = self._object if kind == "object" else self._array
                outer = self._layout
                self._layout = outer.deeper()
                inside = content(schema, path)
                self._layout = outer
                if inside is None:
                    return Call(ANY_OBJECT)
                return self._rule(outer.enclosed(kind, inside), path)
            case "string":
                return self._string(schema, path)
            case "boolean":
                return write.BOOLEAN
            case "null":
                return write.NULL
        return self._number(schema, path, whole=kind == "integer")

    def _rule(self, node: Node, path: str) -> Call:
        """A call of a rule for what may stand at several places, once for every level it nests."""
        name = f"{path} rule {len(self._rules)}"
        self._rules[name] = node
        return Call(name)

    def _number(self, schema: dict[str, Any], path: str, *, whole: bool) -> Node:
        try:
            low, high = bounds(schema)
            if "multipleOf" in schema:
                return self._multiples(schema["multipleOf"], low, high, path)
        except ConstraintError as error:
            self._problems.append(f"{path}: {error}")
            return NOTHING
        if low is None and high is None:
            return write.INTEGER if whole else write.NUMBER
        return between(low, high, whole=whole)

    def _multiples(self, step: float, low: Bound | None, high: Bound | None, path: str) -> Node:
        """Whole numbers that a number divides; multiples that are no whole numbers are left out."""
        numerator, denominator = step.as_integer_ratio()
        if denominator > _LARGEST_DENOMINATOR or numerator > _LARGEST_STEP:
            raise ConstraintError(f"has 'multipleOf' {step}, which is kept up to {_LARGEST_STEP}")
        bounded = low is not None or high is not None
        digits = between(low, high, whole=True) if bounded else write.INTEGER
        if numerator == 1:
            return digits
        rules = together([digits, Multiples(numerator)], prefix=f"{path} step {len(self._rules)}")
        self._rules.update(rules)
        return Call(next(iter(rules)))

    def _string(self, schema: dict[str, Any], path: str) -> Node:
        try:
            node, rules = text_of(schema, f"{path} text {len(self._rules)}")
        except ConstraintError as error:
            self._problems.append(f"{path}: {str(error).removesuffix('.')}")
            return NOTHING
        self._rules.update(rules)
        return node

    def _array(self, schema: dict[str, Any], path: str) -> Node:
        """What stands between the brackets."""
        prefix = schema.get("prefixItems", [])
        least, most = _counts(schema, "Items")
        items = schema.get("items", schema.get("unevaluatedItems", not prefix))
        if schema.get("uniqueItems") and (most is None or most > 1):
            return self._distinct(items, prefix, (least, most), path)
        if "contains" in schema and (schema.get("minContains", 1) or "maxContains" in schema):
            return self._containing(schema, items, prefix, (least, most), path)
        if items is False:
            most = len(prefix) if most is None else min(len(prefix), most)
        item = EMPTY if items is False else self._node(items, f"{path}/items")
        kinds = [self._node(each, f"{path}/prefixItems/{n}") for n, each in enumerate(prefix)]
        kinds = kinds[:most]
        rest = Repeat(self._layout.behind_comma(item), *_span(least - len(kinds), most, len(kinds)))
        content: Node = rest
        if not kinds:
            return self._layout.listed(item, *_span(least, most))
        for index, kind in reversed(list(enumerate(kinds))):
            part = kind if index == 0 else self._layout.behind_comma(kind)
            stop = [EMPTY] if index >= least else []
            content = choice(*stop, sequence(part, content))
        return content

    def _part(self, item: Node, first: bool) -> Node:
        return item if first else self._layout.behind_comma(item)

    def _distinct(
        self, items: Schema, prefix: list[Schema], span: tuple[int, int | None], path: str
    ) -> Node:
        """Items of which none comes twice, of listed values alone."""
        flat = self._compose.alternatives(items, path)
        listed = [self._compose.finite(each) if isinstance(each, dict) else None for each in flat]
        if prefix or any(values is None for values in listed):
            self._problems.append(f"{path} has 'uniqueItems' of items that are not of an enum")
            return NOTHING
        values = {identity(value): value for values in listed for value in values or ()}
        nodes = [self._layout.value(value) for value in values.values()]
        name = f"{path} distinct {len(self._rules)}"
        self._rules.update(rules := distinct(name, nodes, self._part, *span))
        return Call(next(iter(rules)))

    def _containing(
        self,
        schema: dict[str, Any],
        items: Schema,
        prefix: list[Schema],
        span: tuple[int, int | None],
        path: str,
    ) -> Node:
        """Items some of which satisfy ``contains``."""
        inner = schema["contains"]
        least, most = int(schema.get("minContains", 1)), schema.get("maxContains")
        if (
            prefix
            or max(least, most or 0) > _MOST_CONTAINED
            or max(span[0], span[1] or 0) > _MOST_COUNTED
        ):
            self._problems.append(f"{path} has 'contains' beside prefixItems, or large counts")
            return NOTHING
        where = f"{path}/contains"
        matching = self._node({"allOf": [items, inner]}, where)
        other: Node = NOTHING
        if most is not None:
            other = self._node({"allOf": [items, {"not": inner}]}, where)
        kinds = matching, other, self._node(items, f"{path}/items")
        rules = containing(
            f"{path} contains {len(self._rules)}",
            self._part,
            kinds,
            matching=(least, None if most is None else int(most)),
            items=span,
        )
        self._rules.update(rules)
        return Call(next(iter(rules)))

    def _object(self, schema: dict[str, Any], path: str) -> Node | None:
        """What stands between the braces; None: anything."""
        if not OF_TYPE["object"] & set(schema):
            return None
        properties = dict(schema.get("properties", {}))
        required = schema.get("required", [])
        told = schema.get("additionalProperties", schema.get("unevaluatedProperties"))
        for name in required:
            properties.setdefault(name, True if told is None else told)
        names = frozenset(properties)
        extra = self._extra(schema, names, told, path)
        least, most = _counts(schema, "Properties")
        if extra is not None and least > max(1, len(required)):
            # A name may come twice, and counts once.
            self._problems.append(f"{path} has 'minProperties' beside names that are left open")
        patterns = schema.get("patternProperties", {})
        members = []
        for name, value in properties.items():
            told_too = [part for pattern, part in patterns.items() if re.search(pattern, name)]
            if not self._compose.may_be(schema.get("propertyNames", True), name):
                told_too = [False]
            part: Schema = {"allOf": [value, *told_too]} if told_too else value
            node = self._node(part, f"{path}/properties/{name}")
            members.append((self._layout.member(write.literal(name), node), name in required))
        return self._members(members, extra, least, most, path)

    def _extra(
        self, schema: dict[str, Any], names: frozenset[str], told: Schema | None, path: str
    ) -> Node | None:
        """A member that ``properties`` does not name; None: there is none."""
        patterns = list(schema.get("patternProperties", {}).items())
        naming = schema.get("propertyNames", True)
        others = not (names or patterns) if told is None else told
        if naming is False or (others is False and not patterns):
            return None
        if len(patterns) > _MOST_PATTERNS:
            self._problems.append(f"{path} has more than {_MOST_PATTERNS} 'patternProperties'")
            return None
        options = []
        for chosen in product((True, False), repeat=len(patterns)):
            parts = [part for (_, part), is_so in zip(patterns, chosen, strict=True) if is_so]
            if False in parts or (not any(chosen) and others is False):
                continue
            also: list[Any] = [
                {"pattern": pattern} if is_so else {"not": {"pattern": pattern}}
                for (pattern, _), is_so in zip(patterns, chosen, strict=True)
            ]
            also += [{"not": {"enum": sorted(names)}}] * bool(names)
            key = self._node(self._compose.names(naming, also, path), f"{path}/propertyNames")
            where = f"{path}/patternProperties" if parts else f"{path}/additionalProperties"
            value = self._node({"allOf": parts} if parts else others, where)
            options.append(self._layout.member(key, value))
        return Choice(tuple(options))

    def _members(
        self,
        members: list[tuple[Node, bool]],
        extra: Node | None,
        least: int,
        most: int | None,
        path: str,
    ) -> Node:
        """Members in order, optional ones left out or not: a rule for each place and count.

        Counts above what ``least`` and ``most`` ask about are not told apart.
        """
        cap = min(max(least, 1) if most is None else most, len(members))

        number = len(self._rules)  # alternatives have one path

        def name(index: int, count: int) -> str:
            return f"{path} object {number}, member {index} behind {count}"

        for count in range(cap + 1):
            span = _span(least - count, most, count)
            if extra is None:
                end: Node = EMPTY if count >= least else NOTHING
            elif count == 0:
                end = self._layout.listed(extra, *span)
            else:
                end = Repeat(self._layout.behind_comma(extra), *span)
            self._rules[name(len(members), count)] = end
        for index, (member, required) in reversed(list(enumerate(members))):
            for count in range(cap + 1):
                part = self._layout.behind_comma(member) if count else member
                more = Call(name(index + 1, min(count + 1, cap)))
                options: list[Node] = [] if count == most else [sequence(part, more)]
                if not required:
                    options.append(Call(name(index + 1, count)))
                self._rules[name(index, count)] = Choice(tuple(options))
        return Call(name(0, 0))


def _types(schema: dict[str, Any]) -> Iterable[str]:
    """The types that a schema allows: those it names, those its keywords are about, or all."""
    declared = schema.get("type")
    if declared is None:
        implied = [kind for kind in TYPES if OF_TYPE.get(kind, set()) & set(schema)]
        return implied or TYPES
    kinds = [declared] if isinstance(declared, str) else declared
    return [kind for kind in kinds if not (kind == "integer" and "number" in kinds)]


def _counts(schema: dict[str, Any], what: str) -> tuple[int, int | None]:
    """How many there are at least and at most; JSON may write them as 2.0."""
    most = schema.get(f"max{what}")
    return int(schema.get(f"min{what}", 0)), None if most is None else int(most)


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _span(least: int, most: int | None, used: int = 0) -> tuple[int, int | None]:
    """How often something may still come that came ``used`` times."""
    return max(least, 0), None if most is None else max(most - used, 0)
