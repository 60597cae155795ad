"""Tool calls as Gemma 4 writes them, as a grammar.

    <|tool_call>call:weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>

Takes functions with the JSON schemas of their arguments. The schemas are read as those of response
formats are, see ``schema``; only how values are written differs, see ``gemma_text``. Reading them
may take long. So where a request enters they become a text, ``asked_calls``, which is the grammar
of a structural tag, and the grammar is made of it where constraints are compiled, ``call_grammar``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError

from vllm_diffusion.constrain.language.addresses import inside, located
from vllm_diffusion.constrain.language.compose import asserted
from vllm_diffusion.constrain.language.drafts import modern
from vllm_diffusion.constrain.language.gemma_text import CallLayout
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
    Text,
    complement,
    mark,
    optional,
    renamed,
    sequence,
    text,
)
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_diffusion.constrain.language.addresses import Schema

MARK_OF_CALLS: Final = "gemma calls "
"""What the text of ``asked_calls`` begins with; no grammar does."""

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
class CallTokens:
    """The special tokens of a call, as ids."""

    begin: int
    end: int
    quote: int


def asked_calls(
    functions: Sequence[Function], tokens: CallTokens, *, required: bool, several: bool
) -> str:
    """A text that says what ``call_grammar`` makes a grammar of.

    Args:
        functions: those that may be called; at least one.
        tokens: of the tokenizer.
        required: the answer is a call; else it may be text, and calls in it.
        several: more than one call may stand there.
    """
    asked = {
        "functions": [[each.name, each.parameters, each.strict] for each in functions],
        "tokens": asdict(tokens),
        "required": required,
        "several": several,
    }
    return f"{MARK_OF_CALLS}{json.dumps(asked)}"


def call_grammar(asked: str) -> Grammar:
    """The grammar of an answer that calls tools.

    Args:
        asked: what ``asked_calls`` gave.

    Raises:
        ConstraintError: a strict tool's schema says what the grammar cannot, or a tool's schema
            what nobody could write; it names the tool.
    """
    told = json.loads(asked.removeprefix(MARK_OF_CALLS))
    functions = [
        Function(name=name, parameters=parameters, strict=strict)
        for name, parameters, strict in told["functions"]
    ]
    tokens, required, several = CallTokens(**told["tokens"]), told["required"], told["several"]
    layout = CallLayout(tokens.quote)
    rules = layout.any_rules(ANY_VALUE, ANY_ARRAY, ANY_OBJECT)
    # Tools of equal parameters share what stands behind their names.
    named: dict[str, list[Node]] = {}
    arguments: dict[str, str] = {}
    for function in functions:
        key = f"{function.strict} {json.dumps(function.parameters)}"
        if key not in arguments:
            grammar = _arguments(function, layout)
            arguments[key] = grammar.root
            if grammar.rules:
                inner = renamed(grammar, f"{len(arguments)}: ", kept=_SHARED)
                rules.update(inner.rules)
                arguments[key] = inner.root
        named.setdefault(key, []).append(text(function.name))
    calls = [sequence(Choice(tuple(names)), Call(arguments[key])) for key, names in named.items()]
    begin = sequence(Text(mark(tokens.begin)), text("call:"))
    call = sequence(begin, Choice(tuple(calls)), Text(mark(tokens.end)))
    rules["call"] = call
    free = Repeat(_NO_ZERO)
    if required:
        root: Node = Repeat(Call("call"), 1) if several else Call("call")
    else:
        more = sequence(Call("call"), free)
        root = sequence(free, Repeat(more) if several else optional(more))
    rules["calls"] = root
    return Grammar(rules, "calls")


def _arguments(function: Function, layout: CallLayout) -> Grammar:
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
