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
    asserted,
    identity,
)
from vllm_diffusion.constrain.language.drafts import modern
from vllm_diffusion.constrain.language.loose import looser
from vllm_diffusion.constrain.language.negation import TYPES
from vllm_diffusion.constrain.language.numeric import number_of
from vllm_diffusion.constrain.language.objects import in_order
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
    from collections.abc import Callable, Iterable

ANY_VALUE, ANY_ARRAY, ANY_OBJECT = "any value", "any array", "any object"


def json_schema(
    schema: str, *, any_whitespace: bool = True, whitespace_pattern: str | None = None
) -> Grammar:
    """The grammar of a JSON schema.

    Args:
        schema: its text; draft 2020-12, or an older one, see ``drafts``.
        any_whitespace: between the parts of a value the white space of a pretty printer; else none.
        whitespace_pattern: a regular expression for that white space, instead.

    Raises:
        ConstraintError: it is no schema, or says what is not supported; all problems by path.
    """
    try:
        parsed = modern(json.loads(schema, parse_constant=_no_number))
        Draft202012Validator.check_schema(parsed)
        root = located(parsed)
    except SchemaError as error:
        where = error.json_path.replace("$", "#", 1)
        raise ConstraintError(f"This is not a JSON schema: at {where}, {error.message}.") from error
    except ValueError as error:
        raise ConstraintError(f"This is not a JSON schema: {error}.") from error
    try:
        layout = write.Layout(any_whitespace=any_whitespace, pattern=whitespace_pattern)
        translation = Translation(root, layout)
        grammar = translation.grammar()
    except RecursionError as error:
        raise ConstraintError(f"The JSON schema {TOO_DEEP}.") from error
    if translation.problems:
        problems = "; ".join(translation.problems)
        raise ConstraintError(f"The JSON schema cannot be followed exactly: {problems}.")
    return grammar


TOO_DEEP = "nests too deep, or merges a part with itself without end"
"""What is said of a schema that exhausts the stack."""

_MOST_PATTERNS = 3
_MOST_CONTAINED = 9
_MOST_COUNTED = 100


class Translation:
    """One schema's rules: of any value, of what is referred to, of the members of objects.

    Args:
        root: the schema, its references pointers from its root.
        layout: how values are written.
        loose: what cannot be followed is left out, and no problem.
    """

    def __init__(self, root: Schema, layout: write.Layout, *, loose: bool = False) -> None:
        self._layout = layout
        self._loose = loose
        self._problems: list[str] = []
        self._compose = Composition(root, self._problems)
        self._circular = circular(root)
        self._followed: dict[tuple[str, frozenset[str]], int] = {}
        self._rules: dict[str, Node] = layout.any_rules(ANY_VALUE, ANY_ARRAY, ANY_OBJECT)

    def grammar(self) -> Grammar:
        """The rules; of no worth if there are problems then."""
        return Grammar(self._rules, self._reference("#").rule)

    @property
    def problems(self) -> list[str]:
        """What cannot be followed, in words that name a place and a keyword."""
        return list(dict.fromkeys(self._problems))

    def _reference(self, pointer: str) -> Call:
        """A call of the rule of what a reference names, which is translated once a depth."""
        outer = self._layout
        if pointer in self._circular:
            self._layout = outer.at(None)
        depth = self._layout.depth
        name = f"{pointer} at {depth}" if depth else pointer
        target = self._compose.resolved(pointer)
        if name not in self._rules:
            self._rules[name] = NOTHING  # the schema may refer to itself
            self._rules[name] = self._node(target, pointer)
        self._layout = outer
        return Call(name)

    def _node(self, schema: Schema, path: str) -> Node:
        """What one schema reads, or as much of it as can be followed."""
        if isinstance(schema, bool):
            return Call(ANY_VALUE) if schema else NOTHING
        if not self._loose:
            return self._all_of(schema, path)
        key = path, frozenset(schema)  # it is met again where less is asked of what is around it
        known = len(self._problems)
        for attempt, less in enumerate(looser(schema)):
            if attempt >= self._followed.get(key, 0):
                node = self._all_of(less, path)
                if len(self._problems) == known:
                    break
                del self._problems[known:]
        self._followed[key] = attempt
        return node

    def _all_of(self, schema: dict[str, Any], path: str) -> Node:
        """What one schema reads."""
        if not asserted(schema):
            return Call(ANY_VALUE)
        values = self._compose.finite(schema)
        if values is not None:
            return self._layout.values(values)
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
        prefix = f"{path} number {len(self._rules)}"
        numbers = {"any_integer": write.INTEGER, "any_number": self._layout.number}
        return self._with_rules(path, lambda: number_of(schema, prefix, whole=whole, **numbers))

    def _string(self, schema: dict[str, Any], path: str) -> Node:
        prefix = f"{path} text {len(self._rules)}"
        return self._with_rules(path, lambda: text_of(schema, prefix, self._layout))

    def _with_rules(self, path: str, made: Callable[[], tuple[Node, dict[str, Node]]]) -> Node:
        """What a keyword of one type comes to, its rules added; nothing where that is refused."""
        try:
            node, rules = made()
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
        for name, value in self._layout.ordered(properties).items():
            told_too = [part for pattern, part in patterns.items() if re.search(pattern, name)]
            if not self._compose.may_be(schema.get("propertyNames", True), name):
                told_too = [False]
            part: Schema = {"allOf": [value, *told_too]} if told_too else value
            try:
                key = self._layout.name(name)
            except ConstraintError as error:
                self._problems += [] if self._loose else [f"{path}/properties: {error}"]
                continue
            node = self._node(part, f"{path}/properties/{name}")
            members.append((self._layout.member(key, node), name in required))

        def end(count: int) -> Node:
            if extra is None:
                return EMPTY if count >= least else NOTHING
            span = _span(least - count, most, count)
            if not count:
                return self._layout.listed(extra, *span)
            return Repeat(self._layout.behind_comma(extra), *span)

        name = f"{path} object {len(self._rules)}"  # alternatives have one path
        rules = in_order(name, members, self._layout.behind_comma, end, span=(least, most))
        self._rules.update(rules)
        return Call(next(iter(rules)))

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
            key = self._name(self._compose.names(naming, also, path), f"{path}/propertyNames")
            where = f"{path}/patternProperties" if parts else f"{path}/additionalProperties"
            value = self._node({"allOf": parts} if parts else others, where)
            options.append(self._layout.member(key, value))
        return Choice(tuple(options))

    def _name(self, schema: Schema, path: str) -> Node:
        outer = self._layout
        self._layout = outer.naming()
        node = self._node(schema, path)
        self._layout = outer
        return node


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
