"""A constraint is checked where its request enters: it compiles, and fits what may be written.

vLLM refuses every constraint of a diffusion model, and others by what its own backends cannot keep.
Here ours are checked by what is asked of ours, and everything that is wrong is said at once. What
depends on the prompt, how many tokens are left behind it, is checked where the prompt is known.

Also here: how vLLM says that a request thinks before its constraint begins.
"""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_diffusion.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.constrain.automaton.thinking import Thinking


def take_constraints() -> None:
    """Replace `SamplingParams._validate_structured_outputs` for diffusion models."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from vllm_diffusion.engine.constraints.check import constraint_problems
    from vllm_diffusion.patches.request_validation import parse_for

    original = SamplingParams._validate_structured_outputs

    @functools.wraps(original)
    def _validate_structured_outputs(
        self: Any, model_config: Any, structured_outputs_config: Any, tokenizer: Any
    ) -> None:
        if not model_config.is_diffusion:
            original(self, model_config, structured_outputs_config, tokenizer)
            return
        if self.structured_outputs is None:
            return
        if tokenizer is None:
            raise VLLMValidationError(
                "a constraint requires a tokenizer, and skip_tokenizer_init leaves it out"
            )
        problems = []
        try:
            parse_for(self, model_config)
        except ParamsError as error:
            problems.append(str(error))
        try:
            if structured_outputs_config is not None:
                self.structured_outputs = as_text(self.structured_outputs)
                problems += constraint_problems(
                    completed(self, model_config, tokenizer),
                    model_config,
                    structured_outputs_config,
                    tokenizer,
                )
        except (ValueError, VLLMValidationError) as error:
            problems.append(str(error))
        if problems:
            raise VLLMValidationError("; ".join(problems))

    SamplingParams._validate_structured_outputs = _validate_structured_outputs


def as_text(asked: Any) -> Any:
    """The same constraint, a JSON schema as text: that is looked at, copied and sent many times.

    Args:
        asked: vLLM's StructuredOutputsParams.

    Raises:
        VLLMValidationError: it is nested too deep, or asks for nothing.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import check_json_nesting

    check_json_nesting(asked.json)
    check_json_nesting(asked.structural_tag, structural_tag=True)
    if asked.json_object is False:
        raise VLLMValidationError("structured_outputs.json_object is true or left out, not false")
    if asked.json is None or isinstance(asked.json, str):
        return asked
    return replace(asked, json=json.dumps(asked.json))


def completed(sampling: Any, model_config: Any, tokenizer: Any) -> Any:
    """A copy that knows the ids of end tokens and bad words, as the engine's core will see it."""
    copy = sampling.clone()
    # vLLM would read the file for every request.
    end_ids = model_config.hf_config.end_token_ids
    copy.update_from_generation_config({"eos_token_id": end_ids}, tokenizer.eos_token_id)
    copy.update_from_tokenizer(tokenizer)
    return copy


def check_room(input_processor: Any, sampling: Any, prompt_length: int, *, before: int = 0) -> None:
    """Refuse a constraint whose shortest text does not fit behind the prompt.

    Args:
        input_processor: vLLM's, of the engine that the request goes to.
        sampling: the request's parameters, checked.
        prompt_length: tokens.
        before: tokens that thinking takes before it.

    Raises:
        VLLMValidationError: it does not fit.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm_diffusion.engine.constraints.check import constraint_for, no_room
    from vllm_diffusion.engine.constraints.compiler import vocabulary_for

    model = input_processor.model_config
    if not model.is_diffusion or sampling.structured_outputs is None:
        return
    left = model.max_model_len - prompt_length
    limit = left if sampling.max_tokens is None else min(sampling.max_tokens, left)
    config, tokenizer = input_processor.structured_outputs_config, input_processor.tokenizer
    kept = constraint_for(completed(sampling, model, tokenizer), model, config, tokenizer)
    longest = vocabulary_for(tokenizer, model.get_vocab_size()).longest
    if problem := no_room(kept, limit, longest=longest, before=before):
        raise VLLMValidationError(problem)


def diffusion_is_refused() -> bool:
    """Whether vLLM's own check still refuses every constraint of a diffusion model."""
    from vllm.sampling_params import SamplingParams

    original = inspect.unwrap(SamplingParams._validate_structured_outputs)
    return "if model_config.is_diffusion:" in inspect.getsource(original)


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
    from vllm.parser.engine.adapters import ParserEngineReasoningAdapter

    from vllm_diffusion.constrain.automaton.thinking import Thinking

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
