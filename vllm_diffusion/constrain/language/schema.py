"""JSON schema -> grammar. Sound: what the grammar reads is valid, or the schema is refused.

Members come in the order of ``properties``. What a schema leaves open is closed where a writer
would only ramble: an object with ``properties`` has no others unless ``additionalProperties`` says
so, an array with ``prefixItems`` no others without ``items``, and keywords of one type imply it.
``compose`` brings schemas of several parts to this form first.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from vllm_diffusion.constrain.language import json_text as write
from vllm_diffusion.constrain.language.compose import (
    OF_TYPE,
    REFUSED,
    TYPES,
    Composition,
    Schema,
    circular,
)
from vllm_diffusion.constrain.language.formats import FORMATS
from vllm_diffusion.constrain.language.numeric import between, bounds
from vllm_diffusion.constrain.language.regex import regex
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
        return _Translation(parsed, layout).grammar()
    except RecursionError as error:
        raise ConstraintError(
            "The JSON schema nests too deep, or merges a part with itself without end."
        ) from error


class _Translation:
    """One schema's rules: of any value, of what is referred to, of the members of objects."""

    def __init__(self, root: Schema, layout: write.Layout) -> None:
        self._layout = layout
        self._problems: list[str] = []
        if isinstance(root, dict):  # its own address does not matter: nothing is looked up there
            root = {key: value for key, value in root.items() if key != "$id"}
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
        step = schema.get("multipleOf")
        if step is not None and not (whole and step == 1):
            self._problems.append(f"{path} has 'multipleOf'")
        try:
            low, high = bounds(schema)
        except ConstraintError as error:
            self._problems.append(f"{path}: {error}")
            return NOTHING
        if low is None and high is None:
            return write.INTEGER if whole else write.NUMBER
        return between(low, high, whole=whole)

    def _string(self, schema: dict[str, Any], path: str) -> Node:
        least, most = _counts(schema, "Length")
        named = [key for key in ("pattern", "format") if key in schema]
        if not named:
            return sequence(write.QUOTE, Repeat(write.CHARACTER, *_span(least, most)), write.QUOTE)
        if len(named) > 1 or least or most is not None:
            together = [
                key for key in ("pattern", "format", "minLength", "maxLength") if key in schema
            ]
            self._problems.append(f"{path} has {' and '.join(map(repr, together))} together")
            return NOTHING
        if "pattern" in schema:
            return self._pattern(schema["pattern"], path)
        if schema["format"] not in FORMATS:
            known = ", ".join(sorted(FORMATS))
            self._problems.append(f"{path} has the format {schema['format']!r}, not one of {known}")
            return NOTHING
        return write.string(regex(FORMATS[schema["format"]]))

    def _pattern(self, pattern: str, path: str) -> Node:
        try:
            return write.string(regex(pattern, search=True))
        except ConstraintError as error:
            self._problems.append(f"{path}: {str(error).removesuffix('.')}")
            return NOTHING

    def _array(self, schema: dict[str, Any], path: str) -> Node:
        """What stands between the brackets."""
        prefix = schema.get("prefixItems", [])
        least, most = _counts(schema, "Items")
        items = schema.get("items", schema.get("unevaluatedItems", not prefix))
        if schema.get("uniqueItems") and (most is None or most > 1):
            self._problems.append(f"{path} has 'uniqueItems'")
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
        members = [
            (
                self._layout.member(
                    write.literal(name), self._node(value, f"{path}/properties/{name}")
                ),
                name in required,
            )
            for name, value in properties.items()
        ]
        return self._members(members, extra, least, most, path)

    def _extra(
        self, schema: dict[str, Any], names: frozenset[str], told: Schema | None, path: str
    ) -> Node | None:
        """A member that ``properties`` does not name; None: there is none."""
        patterns = schema.get("patternProperties", {})
        naming = schema.get("propertyNames")
        if patterns:
            if names or naming is not None or len(patterns) > 1 or told not in {None, False}:
                self._problems.append(
                    f"{path} has 'patternProperties' beside another keyword or pattern for names"
                )
                return None
            [(pattern, value)] = patterns.items()
            where = f"{path}/patternProperties/{pattern}"
            return self._layout.member(self._pattern(pattern, where), self._node(value, where))
        if naming is not None and names:
            self._problems.append(f"{path} has 'propertyNames' beside named properties")
        others = not names if told is None else told
        if others is False:
            return None
        key = write.string_except(names)
        if naming not in (None, True):
            key = self._node(self._compose.strings(naming, path), f"{path}/propertyNames")
        return self._layout.member(key, self._node(others, f"{path}/additionalProperties"))

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
