"""A constraint compiles while the event loop goes on, and travels compiled.

The checks of a request run in the event loop, where everybody waits. So what they need is asked for
before them, where vLLM awaits the rendering of the prompt, and only looked up by them. What came of
it goes to the engine in the place of the constraint, which has nothing left to compile.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence


def compile_beside(render: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Make a method of `OnlineRenderer` wait until the constraint of its request is compiled.

    And refuse there what the parameters of the request will not tell any more.

    Args:
        render: an async method that takes the request first, gives its prompts last, and is
            awaited before the checks.
    """

    async def compiling(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = await render(self, request, *args, **kwargs)
        if self.model_config.is_diffusion and hasattr(request, "extract_structured_outputs"):
            _refuse_beams(request)
            prompts = result[-1] if isinstance(result, tuple) else result
            # Whatever is wrong is said by the checks.
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                await _compile(self.renderer, request, prompts)
        return result

    return compiling


def _refuse_beams(request: Any) -> None:
    """A beam is written token by token, and vLLM drops what its parameters of beams lack.

    From 0.33 on they have `allowed_token_ids`, which vLLM refuses for diffusion models.
    """
    from vllm.exceptions import VLLMValidationError

    if not vars(request).get("use_beam_search"):
        return
    if request.extract_structured_outputs() is not None:
        raise VLLMValidationError(
            "use_beam_search and a constraint (response_format, structured_outputs or tools that "
            "must be called) exclude each other: beams are not held to it"
        )
    if request.allowed_token_ids is not None:
        raise VLLMValidationError(
            "use_beam_search and allowed_token_ids exclude each other: beams are not held to them"
        )


async def _compile(renderer: Any, request: Any, prompts: Sequence[Any]) -> None:
    """Have the constraint of a request compiled."""
    from vllm.sampling_params import SamplingParams

    from vllm_diffusion.engine.constraints.check import compile_first
    from vllm_diffusion.patches.structured_outputs import as_text, completed

    if (asked := request.extract_structured_outputs()) is None:
        return
    model, tokenizer = renderer.config.model_config, renderer.get_tokenizer()
    sampling = SamplingParams(
        structured_outputs=as_text(asked),
        stop_token_ids=vars(request).get("stop_token_ids"),
        max_tokens=_most_tokens(request, prompts, model),
    )
    config = renderer.config.structured_outputs_config
    await compile_first(completed(sampling, model, tokenizer), model, config, tokenizer)


def _most_tokens(request: Any, prompts: Sequence[Any], model_config: Any) -> int:
    """At least as many tokens as the request may write."""
    fields = vars(request)
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    asked = next((fields[name] for name in names if fields.get(name) is not None), None)
    shortest = min((len(each.get("prompt_token_ids") or ()) for each in prompts), default=0)
    left = max(model_config.max_model_len - shortest, 1)
    return left if asked is None else min(asked, left)


def send_compiled() -> None:
    """Make `InputProcessor.process_inputs` look whether a constrained text fits behind a prompt.

    And send what was compiled in the place of what was asked for.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_diffusion.patches.structured_outputs import check_room

    original = InputProcessor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        sampling = request.sampling_params
        if self.model_config.is_diffusion and sampling and sampling.structured_outputs is not None:
            check_room(self, sampling, len(request.prompt_token_ids or ()))
            _send_compiled(self, sampling)
        return request

    InputProcessor.process_inputs = process_inputs


def _send_compiled(input_processor: Any, sampling: Any) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    from vllm_diffusion.engine.constraints.check import constraint_for, constraint_source
    from vllm_diffusion.engine.constraints.compiler import as_sent

    model, config = input_processor.model_config, input_processor.structured_outputs_config
    kept = constraint_for(sampling, model, config, input_processor.tokenizer)
    ends = constraint_source(sampling, model, config).end_ids
    compiled = StructuredOutputsParams(grammar=as_sent(kept, ends))
    # vLLM 0.33 wants a name, whatever backend the scheduler has put there.
    compiled._backend = "xgrammar"
    sampling.structured_outputs = compiled


def requests_are_checked_in_the_loop() -> bool:
    """Whether a rendered request still enters the engine in the event loop."""
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(AsyncLLM.add_request)
    return "request = self.input_processor.process_inputs(\n" in source
