"""The tools of a chat request, whatever form the served family writes calls in.

Which of them a constraint is asked for, and the types of the arguments that come back.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.language.calls import AskedCalls, Function
from vllm_diffusion.constrain.language.typed import Types

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


def asked_calls(
    request: Any,
    strict_level: Any,
    *,
    form: str,
    tokens: Mapping[str, str],
    vocabulary: Mapping[str, int],
) -> AskedCalls | None:
    """The calls that a request asks for; None where its answer is free.

    Args:
        request: vLLM's, of chat completions or responses.
        strict_level: what vLLM gives a parser's ``get_structural_tag``.
        form: vLLM's name for the form of calls.
        tokens: special tokens that calls are written with, by the family's names for them.
        vocabulary: ids of the tokens.

    Raises:
        VLLMValidationError: the parameters of a tool nest too deep.
    """
    from vllm.tool_parsers.structural_tag_registry import (
        get_structural_tag_tools,
        resolve_tool_strictness,
    )

    choice = request.tool_choice
    offered = get_structural_tag_tools(form, request.tools, choice)
    tools = resolve_tool_strictness(offered, choice, strict_level)
    if not tools:
        return None
    functions = list(map(_fields, tools))
    named = None if isinstance(choice, str) else vars(choice).get("function", choice).name
    if named is not None:
        functions = [each for each in functions if each["name"] == named]
    for each in functions:
        _check_depth(each)
    return AskedCalls(
        functions=tuple(
            Function(
                name=each["name"],
                parameters=each.get("parameters"),
                strict=each.get("strict") is True,
            )
            for each in functions
        ),
        tokens={name: vocabulary[token] for name, token in tokens.items()},
        required=choice != "auto",
        several=named is None and request.parallel_tool_calls is not False,
    )


def types_of(tools: Iterable[Any], name: str) -> Types | None:
    """The types of the arguments of a tool; None where its schema tells none."""
    named = (each for each in map(_fields, tools) if each.get("name") == name)
    schema = next(named, {}).get("parameters")
    with suppress(ValueError, RecursionError):
        return Types(schema) if schema else None
    return None


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
