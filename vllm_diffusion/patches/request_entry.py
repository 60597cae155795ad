"""Where a request enters vLLM it is checked as a whole, and admitted: ``engine.admission``.

``InputProcessor.process_inputs`` makes the engine's own request from a client's. It alone has
tokenizer, prompt and every limit at hand.

A streamed answer has said 200 before that: the call sits in an async generator, which runs when the
first chunk is asked for. So the checks are also made when that generator is called for.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from vllm_diffusion.engine.admission import admit, check_before_answer
from vllm_diffusion.engine.first_canvas import leave_widths_to_us

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


def admit_requests(process_inputs: Callable[..., Any]) -> Callable[..., Any]:
    """Make `InputProcessor.process_inputs` admit the request that it has made."""

    def admitting(self: Any, *args: Any, **kwargs: Any) -> Any:
        leave_widths_to_us(self)
        request = process_inputs(self, *args, **kwargs)
        admit(self, request)
        return request

    return admitting


def check_before_streaming(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Make `AsyncLLM.generate` check a request when called, not when first iterated."""

    def checked(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        check_before_answer(sampling_params, prompt, self, kwargs)
        return generate(self, prompt, sampling_params, *args, **kwargs)

    return checked


def check_before_streaming_responses(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The same for `/v1/responses`, which calls `AsyncLLM.generate` from a generator of its own.

    Wraps `OpenAIServingResponses._generate_with_builtin_tools`.
    """

    def checked(
        self: Any, *args: Any, engine_input: Any, sampling_params: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        check_before_answer(sampling_params, engine_input, self.engine_client, kwargs)
        return generate(
            self, *args, engine_input=engine_input, sampling_params=sampling_params, **kwargs
        )

    return checked


def check_thinking_offline(add_request: Callable[..., str]) -> Callable[..., str]:
    """Make `LLMEngine.add_request` look how the thinking ends before a constraint.

    A server's requests are checked by ``check_before_streaming``, where it is known what the
    server has told the engine of their thinking; of others the prompt tells.
    """
    from vllm.sampling_params import SamplingParams

    def checked(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> str:
        if (
            isinstance(params, SamplingParams)
            and params.structured_outputs is not None
            # vLLM advises against any other form; text would have to become tokens here.
            and isinstance(prompt, dict)
            and "prompt_token_ids" in prompt
        ):
            check_before_answer(params, prompt, self)
        return add_request(self, request_id, prompt, params, *args, **kwargs)

    return checked


def requests_lack_a_hook() -> bool:
    """Whether the tokenizer still meets a request in `process_inputs` and nowhere we could ask."""
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(inspect.unwrap(InputProcessor.process_inputs))
    return "sampling_params.update_from_tokenizer(self.tokenizer)" in source


def generate_is_checked_late() -> bool:
    """Whether `AsyncLLM.generate` still is an async generator itself."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return inspect.isasyncgenfunction(inspect.unwrap(AsyncLLM.generate))


def responses_are_checked_late() -> bool:
    """Whether `/v1/responses` still calls it from an async generator."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    original = inspect.unwrap(OpenAIServingResponses._generate_with_builtin_tools)
    return inspect.isasyncgenfunction(original)


def thinking_is_unchecked_offline() -> bool:
    """Whether `LLMEngine` still lets a request in without its reasoning parser."""
    from vllm.v1.engine.llm_engine import LLMEngine

    return "reasoning" not in inspect.getsource(inspect.unwrap(LLMEngine.add_request))
