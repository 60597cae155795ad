"""A required tool call of a Gemma 4 model is written under a constraint, not hoped for.

vLLM gives tool parsers that know their format a structural tag, by which `required`, a named tool
and strict tools are enforced. Gemma's parser has none, since xgrammar's JSON is not how Gemma
writes arguments. Here it gets one: the grammar of ``constrain.language.gemma_calls``.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from xgrammar import StructuralTag

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
    from vllm.exceptions import VLLMValidationError
    from vllm.tool_parsers.structural_tag_registry import (
        get_structural_tag_tools,
        resolve_tool_strictness,
    )
    from xgrammar.structural_tag import GrammarFormat, StructuralTag

    from vllm_diffusion.constrain.language.gemma_calls import CallTokens, Function, call_grammar
    from vllm_diffusion.errors import ConstraintError

    choice = request.tool_choice
    offered = get_structural_tag_tools(MODEL, request.tools, choice)
    tools = resolve_tool_strictness(offered, choice, strict_level)
    if not tools:
        return None
    # Chat completions keep a tool's fields one level below; a choice of one tool likewise.
    functions = [vars(vars(tool).get("function", tool)) for tool in tools]
    named = None if isinstance(choice, str) else vars(choice).get("function", choice).name
    if named is not None:
        functions = [each for each in functions if each["name"] == named]
    ids = parser.vocab
    try:
        grammar = call_grammar(
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
    except ConstraintError as error:
        raise VLLMValidationError(str(error), parameter="tools") from error
    return StructuralTag(format=GrammarFormat(grammar=grammar))


def calls_are_free() -> bool:
    """Whether vLLM still has no structural tag for Gemma's calls."""
    from vllm.tool_parsers import gemma4_engine_tool_parser

    return "structural_tag_model" not in inspect.getsource(gemma4_engine_tool_parser)
