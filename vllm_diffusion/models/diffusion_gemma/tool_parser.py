"""vLLM's parser of Gemma 4's tool calls: a required call is enforced, and its arguments are typed.

vLLM gives tool parsers that know their format a structural tag, by which `required`, a named tool
and strict tools are enforced. Gemma's parser has none, since xgrammar's JSON is not how Gemma
writes arguments. Here it gets one: the grammar of ``tools.calls``.
"""

from __future__ import annotations

import inspect
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from xgrammar import StructuralTag

    from vllm_diffusion.constrain.language.typed import Types

MODEL: Final = "gemma_4"
"""What vLLM would call the format, if it had it."""


def name_form(model: object) -> str:
    """Make `Gemma4EngineToolParser.structural_tag_model` the name of the format."""
    del model
    return MODEL


def constrain_calls(stock: Callable[..., Any]) -> Callable[..., StructuralTag | None]:
    """Let `Gemma4EngineToolParser.get_structural_tag` build structural tags."""
    import vllm.envs

    del stock

    def get_structural_tag(self: Any, request: Any, **options: Any) -> StructuralTag | None:
        if not vllm.envs.VLLM_ENFORCE_STRICT_TOOL_CALLING:
            return None
        return _structural_tag(self, request, options["strict_level"])

    return get_structural_tag


def _structural_tag(parser: Any, request: Any, strict_level: Any) -> StructuralTag | None:
    from xgrammar.structural_tag import GrammarFormat, StructuralTag

    from vllm_diffusion.engine.constraints.tools import asked_calls
    from vllm_diffusion.models.diffusion_gemma.tools.calls import CALL_TOKENS

    asked = asked_calls(
        request, strict_level, form=MODEL, tokens=CALL_TOKENS, vocabulary=parser.vocab
    )
    return None if asked is None else StructuralTag(format=GrammarFormat(grammar=asked.as_text()))


def type_arguments(fix: Callable[[Any, str, str], str]) -> Callable[[Any, str, str], str]:
    """Let `Gemma4Parser._fix_arg_types` look at the whole schema of a tool."""
    from vllm_diffusion.engine.constraints.tools import types_of

    def fix_arg_types(self: Any, args_json: str, func_name: str) -> str:
        guessed = fix(self, args_json, func_name)
        known: dict[str, Types | None] = vars(self).setdefault("_vllm_diffusion_types", {})
        if func_name not in known:
            known[func_name] = types_of(vars(self)["_tools"] or (), func_name)
        types = known[func_name]
        # A schema may be anything, and what it raises is as various.
        with suppress(Exception):
            if types is not None:
                found = types.typed(json.loads(args_json), json.loads(guessed))
                return json.dumps(found, ensure_ascii=False)
        return guessed

    return fix_arg_types


def arguments_are_texts() -> bool:
    """Whether vLLM still takes what a reference leads to for a text."""
    from vllm.tool_parsers.utils import extract_types_from_schema

    return extract_types_from_schema({"$ref": "#/$defs/number"}) == ["string"]


def calls_are_free() -> bool:
    """Whether vLLM still has no structural tag for Gemma's calls."""
    from vllm.tool_parsers import gemma4_engine_tool_parser

    return "structural_tag_model" not in inspect.getsource(gemma4_engine_tool_parser)
