"""Tool calls in the form of a family, as a grammar.

Takes functions with the JSON schemas of their arguments. The schemas are read as those of response
formats are, see ``schema``; a family says how values are written, by its ``Layout``, and what
stands around them. Reading schemas may take long. So where a request enters, ``AskedCalls`` becomes
a text, which is the grammar of a structural tag, and the grammar is made of it where constraints
are compiled, by the family's maker (``maker_of``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from vllm_diffusion.constrain.language.addresses import inside, located
from vllm_diffusion.constrain.language.compose import asserted
from vllm_diffusion.constrain.language.drafts import modern
from vllm_diffusion.constrain.language.room import shortest
from vllm_diffusion.constrain.language.schema import (
    ANY_ARRAY,
    ANY_OBJECT,
    ANY_VALUE,
    TOO_DEEP,
    Translation,
)
from vllm_diffusion.constrain.language.syntax import (
    Call,
    Chars,
    Choice,
    Grammar,
    Node,
    Repeat,
    complement,
    optional,
    renamed,
    sequence,
    text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_diffusion.constrain.language.addresses import Schema
    from vllm_diffusion.constrain.language.json_text import Layout

MARK_OF_CALLS: Final = "tool calls "
"""What the text of ``AskedCalls`` begins with; no grammar does."""

_SHARED = {ANY_VALUE, ANY_ARRAY, ANY_OBJECT}
_BOUNDS = (
    *((f"min{what}", f"max{what}") for what in ("Length", "Items", "Properties", "Contains")),
    ("minimum", "maximum"),
)
_NO_ZERO = Chars(complement(((0, 0),)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A tool that may be called."""

    name: str
    parameters: Mapping[str, Any] | None
    """JSON schema of the arguments; None: anything."""
    strict: bool
    """All of the schema must be kept, or the tool is refused; else as much as possible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedCalls:
    """The calls that an answer may or must have."""

    functions: tuple[Function, ...]
    """Those that may be called; at least one."""
    tokens: Mapping[str, int]
    """Ids of the special tokens that calls are written with, by the family's names for them."""
    required: bool
    """The answer is a call; else it may be text, and calls in it."""
    several: bool
    """More than one call may stand there."""

    def as_text(self) -> str:
        """What ``of_text`` reads."""
        asked = {
            "functions": [[each.name, each.parameters, each.strict] for each in self.functions],
            "tokens": dict(self.tokens),
            "required": self.required,
            "several": self.several,
        }
        return f"{MARK_OF_CALLS}{json.dumps(asked)}"

    @classmethod
    def of_text(cls, text: str) -> AskedCalls:
        """What ``as_text`` wrote.

        Raises:
            ValueError, KeyError, TypeError: it did not write this.
        """
        told = json.loads(text.removeprefix(MARK_OF_CALLS))
        functions = (
            Function(name=name, parameters=parameters, strict=strict)
            for name, parameters, strict in told["functions"]
        )
        return cls(
            functions=tuple(functions),
            tokens=dict(told["tokens"]),
            required=told["required"],
            several=told["several"],
        )


CallMaker: TypeAlias = Callable[[AskedCalls], Grammar]
"""Makes the grammar of an answer that calls tools, in the form of a family.

It raises ``ConstraintError`` as ``grammar_of_calls`` does.
"""


def maker_of(reference: str) -> CallMaker:
    """The maker that a family names as "module:function".

    Resolved where it is called: the process that compiles constraints loads a family's form with
    the first call that it compiles.
    """
    module, _, name = reference.partition(":")
    maker: CallMaker = getattr(import_module(module), name)
    return maker


def grammar_of_calls(
    asked: AskedCalls,
    layout: Layout,
    written: Callable[[Sequence[tuple[Node, Node]]], Node],
) -> Grammar:
    """The grammar of an answer that calls tools.

    Args:
        asked: what is asked for.
        layout: how values are written.
        written: how one call is, of pairs: names, and the arguments that each of them takes.

    Raises:
        ConstraintError: a strict tool's schema says what the grammar cannot, or a tool's schema
            what nobody could write; it names the tool.
    """
    rules = layout.any_rules(ANY_VALUE, ANY_ARRAY, ANY_OBJECT)
    # Tools of equal parameters share what stands behind their names.
    named: dict[str, list[Node]] = {}
    arguments: dict[str, str] = {}
    for function in asked.functions:
        key = f"{function.strict} {json.dumps(function.parameters)}"
        if key not in arguments:
            grammar = _arguments(function, layout)
            arguments[key] = grammar.root
            if grammar.rules:
                inner = renamed(grammar, f"{len(arguments)}: ", kept=_SHARED)
                rules.update(inner.rules)
                arguments[key] = inner.root
        named.setdefault(key, []).append(text(function.name))
    rules["call"] = written(
        [(Choice(tuple(names)), Call(arguments[key])) for key, names in named.items()]
    )
    free = Repeat(_NO_ZERO)
    if asked.required:
        root: Node = Repeat(Call("call"), 1) if asked.several else Call("call")
    else:
        more = sequence(Call("call"), free)
        root = sequence(free, Repeat(more) if asked.several else optional(more))
    rules["calls"] = root
    return Grammar(rules, "calls")


def _arguments(function: Function, layout: Layout) -> Grammar:
    """The rules of what stands in a call's braces, these included; of any object, none."""
    anything = Grammar({}, ANY_OBJECT)
    if function.parameters is None:
        return anything
    try:
        told = json.loads(json.dumps(function.parameters), parse_constant=_no_number)
        schema = modern(told)
        Draft202012Validator.check_schema(schema)
        _refuse_contradictions(schema)
        root = located(_of_objects(schema))
        translation = Translation(root, layout, loose=not function.strict)
        grammar = translation.grammar()
        problems = translation.problems
        if not problems and shortest(grammar) is None:
            problems = ["no arguments satisfy the schema"]
    except ConstraintError as error:  # what nobody can write
        raise ConstraintError(f"The tool {function.name!r} cannot be called: {error}") from error
    except SchemaError as error:
        problems = [f"they are not a JSON schema: at {error.json_path}, {error.message}"]
    except ValueError as error:
        problems = [f"they are not a JSON schema: {error}"]
    except RecursionError:
        problems = [f"the schema {TOO_DEEP}"]
    if not problems:
        return grammar
    if not function.strict:
        return anything
    raise ConstraintError(
        f"The parameters of the strict tool {function.name!r} cannot be kept: "
        f'{"; ".join(problems)}. Change them, or set "strict" to false.'
    )


def _of_objects(schema: Schema) -> Schema:
    """A schema of parameters, as one of objects; one that speaks of none allows none."""
    if isinstance(schema, bool):
        return schema
    said = {key: value for key, value in asserted(schema).items() if value not in ({}, [])}
    kinds = said.get("type", "object")
    if kinds != "object" and "object" not in (kinds if isinstance(kinds, list) else ()):
        return False
    if said.keys() <= {"type", "additionalProperties"} and not said.get("additionalProperties"):
        return {"type": "object", "additionalProperties": False}
    return {**schema, "type": "object"}


def _refuse_contradictions(schema: Schema) -> None:
    """Bounds between which nothing lies are a mistake, whoever made it."""
    found = []
    pending = [(schema, "#")]
    for part, path in pending:
        if not isinstance(part, dict):
            continue
        pending += [(inner, where) for _, _, inner, where in inside(part, path)]
        for low, high in _BOUNDS:
            if low in part and high in part and part[low] > part[high]:
                found.append(f"{path} has {low} {part[low]} above {high} {part[high]}")
    if found:
        raise ConstraintError("; ".join(found))


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
