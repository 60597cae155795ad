"""A request to a diffusion model is checked by us: one message that names every problem.

vLLM's own check refuses parameters that a canvas can honour (a seed, say) and lets others through
that it then ignores. Ours reads the same request and decides by `request.parse`. It runs in the
process the client talks to, so a refusal is an answer of status 400.

A streamed answer has said 200 before vLLM checks its request: the check sits in an async generator,
which runs when the first chunk is asked for. So where a diffusion model is served the check is also
made when that generator is called for, which is before the answer begins.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.engine.constraints.thinking import thinking_takes
from vllm_diffusion.errors import ParamsError
from vllm_diffusion.patches.canvas_text import check_text
from vllm_diffusion.patches.structured_outputs import check_room
from vllm_diffusion.upstream.core_messages import check_message

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

# What a server tells `AsyncLLM.generate` about a request's thinking.
_REASONING: Final = ("reasoning_ended", "reasoning_parser_kwargs")

# What else of a client's it passes on, and what clients call it.
_PASSED_ON: Final = {
    "priority": "priority",
    "session_id": "session_id",
    "reasoning_parser_kwargs": "chat_template_kwargs",
}


# vLLM goes on behind a turn with what it counts as computed: of a canvas the end of the turn is in,
# too much, which ends its engine; where commits are fused, without that canvas.
_NO_STREAMING_INPUT: Final = (
    "a diffusion model takes no input that comes piece by piece: the canvas that ends a turn has "
    "rows behind its end, and nothing can be appended to them. Send every turn as a request of its "
    "own that holds the conversation so far; the prefix cache keeps its beginning"
)


def check_requests_ourselves() -> None:
    """Replace `SamplingParams._validate_diffusion` for diffusion models; others keep vLLM's."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    original = SamplingParams._validate_diffusion

    @functools.wraps(original)
    def _validate_diffusion(self: Any, model_config: Any) -> None:
        # With a constraint the next check, ``structured_outputs``, says all of it at once.
        if not model_config.is_diffusion or self.structured_outputs is not None:
            return
        try:
            parse_for(self, model_config)
        except ParamsError as error:
            raise VLLMValidationError(str(error)) from error

    SamplingParams._validate_diffusion = _validate_diffusion


def parse_for(sampling: Any, model_config: Any) -> None:
    """Hold a request's parameters against what an engine serves.

    Args:
        sampling: vLLM's SamplingParams.
        model_config: vLLM's, of a diffusion model.

    Raises:
        ParamsError: everything that is wrong.
    """
    # Here, since the table of patches is read where neither vLLM nor torch is wanted.
    from vllm_diffusion.engine import carriers
    from vllm_diffusion.request.parse import parse_params

    served = carriers.served(model_config.hf_config)
    parse_params(
        sampling,
        canvas_length=served.canvas_length,
        vocab_size=model_config.get_vocab_size(),
        rules=served.rules,
    )


def stock_check_refuses_seed() -> bool:
    """Whether vLLM's own check still refuses what ours accepts."""
    from vllm.sampling_params import SamplingParams

    original = inspect.unwrap(SamplingParams._validate_diffusion)
    return "self.seed is not None" in inspect.getsource(original)


def _check_now(
    sampling_params: Any,
    prompt: Any,
    engine: Any,
    *,
    reasoning_ended: bool | None = None,
    reasoning_parser_kwargs: dict[str, Any] | None = None,
) -> None:
    """Our checks, and vLLM's checks of what only a server knows: vocabulary and limits."""
    from vllm.exceptions import VLLMValidationError

    model_config, inputs = engine.model_config, engine.input_processor
    if inspect.isasyncgen(prompt) and model_config.is_diffusion:
        raise VLLMValidationError(_NO_STREAMING_INPUT)
    # Ids before the constraint, which is compiled for the tokens that they name.
    sampling_params._validate_logprobs(model_config)
    sampling_params._validate_logit_bias(model_config)
    sampling_params._validate_stop_token_ids(model_config)
    sampling_params._validate_allowed_token_ids(model_config)
    sampling_params._validate_diffusion(model_config)
    sampling_params._validate_structured_outputs(
        model_config, inputs.structured_outputs_config, inputs.tokenizer
    )
    check_text(inputs, sampling_params, prompt)
    if sampling_params.structured_outputs is not None:
        ids = (prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None) or ()
        before = thinking_takes(
            engine, ids, ended=reasoning_ended, parser_kwargs=reasoning_parser_kwargs
        )
        check_room(inputs, sampling_params, len(ids), before=before)


def _passed_on(arguments: dict[str, Any]) -> dict[str, Any]:
    return {known: arguments.get(name) for name, known in _PASSED_ON.items()}


def check_before_streaming() -> None:
    """Make `AsyncLLM.generate` check a request when called, not when first iterated."""
    from vllm.v1.engine.async_llm import AsyncLLM

    original = AsyncLLM.generate

    @functools.wraps(original)
    def generate(
        self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        reasoning = {name: kwargs.get(name) for name in _REASONING}
        _check_now(sampling_params, prompt, self, **reasoning)
        check_message(sampling_params, _passed_on(kwargs))
        return original(self, prompt, sampling_params, *args, **kwargs)

    AsyncLLM.generate = generate


def check_thinking_offline() -> None:
    """Make `LLMEngine.add_request` look how the thinking ends before a constraint.

    A server's requests are checked by ``check_before_streaming``, where it is known what the
    server has told the engine of their thinking; of others the prompt tells.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    original = LLMEngine.add_request

    @functools.wraps(original)
    def add_request(
        self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> str:
        if (
            self.model_config.is_diffusion
            and isinstance(params, SamplingParams)
            and params.structured_outputs is not None
            # vLLM advises against any other form; text would have to become tokens here.
            and isinstance(prompt, dict)
            and "prompt_token_ids" in prompt
        ):
            _check_now(params, prompt, self)
        return original(self, request_id, prompt, params, *args, **kwargs)

    LLMEngine.add_request = add_request


def check_before_streaming_responses() -> None:
    """The same for `/v1/responses`, which calls `AsyncLLM.generate` from a generator of its own."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    original = OpenAIServingResponses._generate_with_builtin_tools

    @functools.wraps(original)
    def _generate_with_builtin_tools(
        self: Any, *args: Any, engine_input: Any, sampling_params: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        reasoning = kwargs.get("reasoning_parser_kwargs")
        _check_now(
            sampling_params, engine_input, self.engine_client, reasoning_parser_kwargs=reasoning
        )
        check_message(sampling_params, _passed_on(kwargs))
        return original(
            self, *args, engine_input=engine_input, sampling_params=sampling_params, **kwargs
        )

    OpenAIServingResponses._generate_with_builtin_tools = _generate_with_builtin_tools


def generate_is_checked_late() -> bool:
    """Whether `AsyncLLM.generate` still is an async generator itself."""
    from vllm.v1.engine.async_llm import AsyncLLM

    return inspect.isasyncgenfunction(inspect.unwrap(AsyncLLM.generate))


def thinking_is_unchecked_offline() -> bool:
    """Whether `LLMEngine` still lets a request in without its reasoning parser."""
    from vllm.v1.engine.llm_engine import LLMEngine

    return "reasoning" not in inspect.getsource(inspect.unwrap(LLMEngine.add_request))


def responses_are_checked_late() -> bool:
    """Whether `/v1/responses` still calls it from an async generator."""
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    original = inspect.unwrap(OpenAIServingResponses._generate_with_builtin_tools)
    return inspect.isasyncgenfunction(original)
