"""How vLLM says that a request thinks before its constraint begins.

A server's reasoning parser knows the tokens between which a model thinks. It is asked where a
request enters, for the room that thinking takes, and in the scheduler, for the automaton that
lets the request think first.
"""

# ruff: noqa: SLF001 - vLLM tells its own scheduler of thinking by private names alone.

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_diffusion.constrain.automaton.thinking import Thinking

if TYPE_CHECKING:
    from collections.abc import Sequence


def thinking_of(manager: Any, request: Any) -> Thinking | None:
    """How a request thinks that has not begun to answer; None if it does not think.

    Args:
        manager: vLLM's StructuredOutputManager.
        request: of the scheduler, with a constraint, before its first token.
    """
    if manager._get_constraint_bounds(request, ()).constraint_start == 0:
        return None
    return told_by(manager._get_reasoner(request), request.prompt_token_ids or ())


def told_by(reasoner: Any, prompt: Sequence[int]) -> Thinking | None:
    """How thinking begins and ends behind a prompt; None where no one token ends it.

    Where the prompt has not opened it, the text must: a parser that reads a stream would take the
    thinking for content, or the answer for thinking, while one that knows the end does not.

    Args:
        reasoner: vLLM's reasoning parser, of a request.
        prompt: token ids.
    """
    # Loads every format of tool calls, which a core without a reasoning parser does not need.
    from vllm.parser.engine.adapters import ParserEngineReasoningAdapter

    until = reasoner.vocab.get(reasoner.reasoning_end_str)
    if until is None or not reasoner.is_reasoning_end_streaming([*prompt, until], [until]):
        return None
    begin = reasoner.vocab.get(reasoner.reasoning_start_str)
    borders = {begin, until}
    # Parsers that vLLM builds from a description also take the start of a tool call for an end.
    if isinstance(reasoner, ParserEngineReasoningAdapter):
        borders |= reasoner.reasoning_end_token_ids
        borders |= reasoner._parser_engine._turn_boundary_token_ids
    last = next((token for token in reversed(prompt) if token in borders), None)
    # What is no text, tool calls and turns among it, is no thought.
    others = {token for token in borders if token is not None} | _special(reasoner.model_tokenizer)
    return Thinking(
        until=until,
        begin=None if last == begin else begin,
        forbidden=tuple(sorted(others - {until})),
    )


@functools.lru_cache(maxsize=2)
def _special(tokenizer: Any) -> frozenset[int]:
    """The ids of a tokenizer that stand for no text."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token for token, each in added if each.special}


def thinking_takes(
    engine: Any, prompt: Sequence[int], *, ended: bool | None, parser_kwargs: dict[str, Any] | None
) -> int:
    """How many tokens thinking takes at least before a request's constraint begins.

    0 where it does not think, as the engine's core will decide.

    Args:
        engine: vLLM's AsyncLLM or LLMEngine.
        prompt: token ids.
        ended: what the server knows of it.
        parser_kwargs: of the request, for the reasoning parser.

    Raises:
        VLLMValidationError: it does, and no single token ends the thinking; or the parser is not
            one for this tokenizer, so that nobody knows.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.reasoning import ReasoningParserManager

    config = engine.vllm_config.structured_outputs_config
    if ended or not config.reasoning_parser or config.enable_in_reasoning:
        return 0
    reasoner_cls = ReasoningParserManager.get_reasoning_parser(config.reasoning_parser)
    try:
        reasoner = reasoner_cls(engine.input_processor.tokenizer, **(parser_kwargs or {}))
        if ended is None and reasoner.is_reasoning_end(list(prompt)):
            return 0
        thinking = told_by(reasoner, prompt)
    except Exception as error:
        # Parsers raise what they like where the tokenizer lacks their tokens.
        raise VLLMValidationError(
            f"where a constraint begins is for the reasoning parser {config.reasoning_parser!r} to "
            f"say, which does not fit this model's tokenizer ({error}): serve with a parser that "
            "does, or none"
        ) from error
    if thinking is None:
        raise VLLMValidationError(
            f"a constraint behind thinking needs a token that ends the thinking, and the reasoning "
            f"parser {config.reasoning_parser!r} has none: switch thinking off for this request, "
            "or serve with --structured-outputs-config.enable_in_reasoning=true"
        )
    return thinking.tokens
