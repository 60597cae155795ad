"""A constraint is checked where its request enters: it compiles, and fits what may be written.

vLLM refuses every constraint of a diffusion model. Here its own checks run without that one, then
ours, and everything that is wrong is said at once. What depends on the prompt, how many tokens are
left behind it, is checked where the prompt is known.

Also here: how vLLM says that a request thinks before its constraint begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import ParamsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.engine.constraints import Thinking

# All that vLLM's own check asks of a model's config.
_TOKEN_BY_TOKEN: Final = SimpleNamespace(is_diffusion=False)


def take_constraints() -> None:
    """Replace `SamplingParams._validate_structured_outputs` for diffusion models."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from vllm_diffusion.engine.constraint_check import constraint_problems
    from vllm_diffusion.upstream.request_validation import parse_for

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
        problems = []
        try:
            parse_for(self, model_config)
        except ParamsError as error:
            problems.append(str(error))
        try:
            original(self, _TOKEN_BY_TOKEN, structured_outputs_config, tokenizer)
            if structured_outputs_config is not None:
                completed = _completed(self, model_config, tokenizer)
                problems += constraint_problems(
                    completed, model_config, structured_outputs_config, tokenizer
                )
        except (ValueError, VLLMValidationError) as error:
            problems.append(str(error))
        if problems:
            raise VLLMValidationError("; ".join(problems))

    SamplingParams._validate_structured_outputs = _validate_structured_outputs


def _completed(sampling: Any, model_config: Any, tokenizer: Any) -> Any:
    """A copy that knows the ids of end tokens and bad words, as the engine's core will see it."""
    completed = sampling.clone()
    completed.update_from_generation_config(
        model_config.try_get_generation_config(), tokenizer.eos_token_id
    )
    completed.update_from_tokenizer(tokenizer)
    return completed


def leave_room() -> None:
    """Make `InputProcessor.process_inputs` look whether a constrained text fits behind a prompt."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if request.sampling_params is not None:
            check_room(self, request.sampling_params, len(request.prompt_token_ids or ()))
        return request

    InputProcessor.process_inputs = process_inputs


def check_room(
    input_processor: Any, sampling: Any, prompt_length: int, *, thinks: bool = False
) -> None:
    """Refuse a constraint whose shortest text does not fit behind the prompt.

    Args:
        input_processor: vLLM's, of the engine that the request goes to.
        sampling: the request's parameters, checked.
        prompt_length: tokens.
        thinks: the request thinks first.

    Raises:
        VLLMValidationError: it does not fit.
    """
    from vllm.exceptions import VLLMValidationError

    from vllm_diffusion.engine.constraint_check import constraint_for, no_room

    model = input_processor.model_config
    if not model.is_diffusion or sampling.structured_outputs is None:
        return
    left = model.max_model_len - prompt_length
    limit = left if sampling.max_tokens is None else min(sampling.max_tokens, left)
    config, tokenizer = input_processor.structured_outputs_config, input_processor.tokenizer
    kept = constraint_for(_completed(sampling, model, tokenizer), model, config, tokenizer)
    if problem := no_room(kept, limit, thinks=thinks):
        raise VLLMValidationError(problem)


def compile_beside(name: str) -> None:
    """Make a method of `OnlineRenderer` compile the constraint of its request in a thread.

    The checks of a request run in the event loop, before its answer begins. With the automaton in
    the cache by then, they take no time from other clients.

    And refuse there what the parameters of the request will not tell any more.

    Args:
        name: of an async method that takes the request first and is awaited before the checks.
    """
    from vllm.renderers.online_renderer import OnlineRenderer

    original = vars(OnlineRenderer)[name]

    @functools.wraps(original)
    async def compiling(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = await original(self, request, *args, **kwargs)
        if self.model_config.is_diffusion and hasattr(request, "extract_structured_outputs"):
            _refuse_beams(request)
            await asyncio.to_thread(_compile, self.renderer, request)
        return result

    setattr(OnlineRenderer, name, compiling)


def _refuse_beams(request: Any) -> None:
    """A beam is written token by token, and vLLM's parameters of beams have no constraint."""
    from vllm.exceptions import VLLMValidationError

    if vars(request).get("use_beam_search") and request.extract_structured_outputs() is not None:
        raise VLLMValidationError(
            "use_beam_search and a constraint (response_format, structured_outputs or tools that "
            "must be called) exclude each other: beams are not held to it"
        )


def _compile(renderer: Any, request: Any) -> None:
    """Leave the automaton of a request in the cache; whatever is wrong is said by its checks."""
    from vllm.sampling_params import SamplingParams

    with contextlib.suppress(Exception):
        constraint = request.extract_structured_outputs()
        if constraint is not None:
            sampling = SamplingParams(
                # vLLM's check may write into it.
                structured_outputs=replace(constraint),
                stop_token_ids=request.stop_token_ids,
            )
            config = renderer.config
            sampling._validate_structured_outputs(
                config.model_config, config.structured_outputs_config, renderer.get_tokenizer()
            )


def requests_are_checked_in_the_loop() -> bool:
    """Whether a rendered request still enters the engine in the event loop."""
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(AsyncLLM.add_request)
    return "request = self.input_processor.process_inputs(\n" in source


def diffusion_is_refused() -> bool:
    """Whether vLLM's own check still refuses every constraint of a diffusion model."""
    from vllm.sampling_params import SamplingParams

    original = inspect.unwrap(SamplingParams._validate_structured_outputs)
    return "if model_config.is_diffusion:" in inspect.getsource(original)


def thinking_of(manager: Any, request: Any) -> Thinking | None:
    """How the thinking of a request ends that has not begun to answer; None if it does not think.

    Args:
        manager: vLLM's StructuredOutputManager.
        request: of the scheduler, with a constraint, before its first token.
    """
    if manager._get_constraint_bounds(request, ()).constraint_start == 0:
        return None
    return ending(manager._get_reasoner(request), request.prompt_token_ids or ())


def ending(reasoner: Any, prompt: Sequence[int]) -> Thinking | None:
    """The one token by which a reasoning parser knows that thinking is over; None without one.

    Args:
        reasoner: vLLM's reasoning parser, of a request.
        prompt: token ids.
    """
    from vllm.parser.engine.adapters import ParserEngineReasoningAdapter

    from vllm_diffusion.engine.constraints import Thinking

    until = reasoner.vocab.get(reasoner.reasoning_end_str)
    if until is None or not reasoner.is_reasoning_end_streaming([*prompt, until], [until]):
        return None
    # Parsers that vLLM builds from a description also take the start of a tool call for an end.
    described = isinstance(reasoner, ParserEngineReasoningAdapter)
    others = (reasoner.reasoning_end_token_ids if described else frozenset()) - {until}
    return Thinking(until=until, forbidden=tuple(sorted(others)))


def thinks_first(
    engine: Any, prompt: Sequence[int], *, ended: bool | None, parser_kwargs: dict[str, Any] | None
) -> bool:
    """Whether a request thinks before its constraint begins, as the engine's core will decide.

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
        return False
    reasoner_cls = ReasoningParserManager.get_reasoning_parser(config.reasoning_parser)
    try:
        reasoner = reasoner_cls(engine.input_processor.tokenizer, **(parser_kwargs or {}))
        if ended is None and reasoner.is_reasoning_end(list(prompt)):
            return False
        end = ending(reasoner, prompt)
    except Exception as error:
        # Parsers raise what they like where the tokenizer lacks their tokens.
        raise VLLMValidationError(
            f"where a constraint begins is for the reasoning parser {config.reasoning_parser!r} to "
            f"say, which does not fit this model's tokenizer ({error}): serve with a parser that "
            "does, or none"
        ) from error
    if end is None:
        raise VLLMValidationError(
            f"a constraint behind thinking needs a token that ends the thinking, and the reasoning "
            f"parser {config.reasoning_parser!r} has none: switch thinking off for this request, "
            "or serve with --structured-outputs-config.enable_in_reasoning=true"
        )
    return True
