"""A required tool call of a Gemma 4 model is written under a constraint, not hoped for.

vLLM gives tool parsers that know their format a structural tag, by which `required`, a named tool
and strict tools are enforced. Gemma's parser has none, since xgrammar's JSON is not how Gemma
writes arguments. Here it gets one: the grammar of ``constrain.language.gemma_calls``.

Also here: the types of the arguments that it reads.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from xgrammar import StructuralTag

    from vllm_diffusion.constrain.language.typed import Types

MODEL: Final = "gemma_4"
"""What vLLM would call the format, if it had it."""


def constrain_calls() -> None:
    """Let `Gemma4EngineToolParser` build structural tags."""
    import vllm.envs
    from vllm.tool_parsers.gemma4_engine_tool_parser import Gemma4EngineToolParser

    def get_structural_tag(self: Any, request: Any, **options: Any) -> StructuralTag | None:
        if not vllm.envs.VLLM_ENFORCE_STRICT_TOOL_CALLING:
            return None
        return _structural_tag(self, request, options["strict_level"])

    Gemma4EngineToolParser.structural_tag_model = MODEL
    Gemma4EngineToolParser.get_structural_tag = get_structural_tag


def _structural_tag(parser: Any, request: Any, strict_level: Any) -> StructuralTag | None:
    from vllm.tool_parsers.structural_tag_registry import (
        get_structural_tag_tools,
        resolve_tool_strictness,
    )
    from xgrammar.structural_tag import GrammarFormat, StructuralTag

    from vllm_diffusion.constrain.language.gemma_calls import CallTokens, Function, asked_calls

    choice = request.tool_choice
    offered = get_structural_tag_tools(MODEL, request.tools, choice)
    tools = resolve_tool_strictness(offered, choice, strict_level)
    if not tools:
        return None
    functions = list(map(_fields, tools))
    named = None if isinstance(choice, str) else vars(choice).get("function", choice).name
    if named is not None:
        functions = [each for each in functions if each["name"] == named]
    for each in functions:
        _check_depth(each)
    ids = parser.vocab
    asked = asked_calls(
        [
            Function(
                name=each["name"],
                parameters=each.get("parameters"),
                strict=each.get("strict") is True,
            )
            for each in functions
        ],
        CallTokens(begin=ids["<|tool_call>"], end=ids["<tool_call|>"], quote=ids['<|"|>']),
        required=choice != "auto",
        several=named is None and request.parallel_tool_calls is not False,
    )
    return StructuralTag(format=GrammarFormat(grammar=asked))


def _check_depth(function: dict[str, Any]) -> None:
    """Refuse parameters that nest deeper than vLLM lets the schema of a response nest."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import check_json_nesting

    try:
        check_json_nesting(function.get("parameters"))
    except VLLMValidationError as error:
        message = f"The parameters of the tool {function['name']!r}: {error}"
        raise VLLMValidationError(message, parameter="tools") from error


def _fields(tool: Any) -> dict[str, Any]:
    """Name, parameters and the like; chat completions keep them one level below."""
    return vars(vars(tool).get("function", tool))


def type_arguments() -> None:
    """Let `Gemma4Parser` look at the whole schema of a tool for the types of arguments."""
    from vllm.parser.gemma4 import Gemma4Parser

    original = Gemma4Parser._fix_arg_types

    @functools.wraps(original)
    def _fix_arg_types(self: Any, args_json: str, func_name: str) -> str:
        guessed: str = original(self, args_json, func_name)
        known: dict[str, Types | None] = vars(self).setdefault("_vllm_diffusion_types", {})
        if func_name not in known:
            known[func_name] = _types_of(self._tools or (), func_name)
        types = known[func_name]
        # A schema may be anything, and what it raises is as various.
        with contextlib.suppress(Exception):
            if types is not None:
                found = types.typed(json.loads(args_json), json.loads(guessed))
                return json.dumps(found, ensure_ascii=False)
        return guessed

    Gemma4Parser._fix_arg_types = _fix_arg_types


def _types_of(tools: Iterable[Any], name: str) -> Types | None:
    """The types of the arguments of a tool; None where its schema tells none."""
    from vllm_diffusion.constrain.language.typed import Types

    named = (each for each in map(_fields, tools) if each.get("name") == name)
    schema = next(named, {}).get("parameters")
    with contextlib.suppress(ValueError, RecursionError):
        return Types(schema) if schema else None
    return None


def arguments_are_texts() -> bool:
    """Whether vLLM still takes what a reference leads to for a text."""
    from vllm.tool_parsers.utils import extract_types_from_schema

    return extract_types_from_schema({"$ref": "#/$defs/number"}) == ["string"]


def calls_are_free() -> bool:
    """Whether vLLM still has no structural tag for Gemma's calls."""
    from vllm.tool_parsers import gemma4_engine_tool_parser

    return "structural_tag_model" not in inspect.getsource(gemma4_engine_tool_parser)
