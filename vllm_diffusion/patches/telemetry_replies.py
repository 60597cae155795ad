"""A reply over HTTP carries telemetry where its request asked for it.

vLLM's handlers build a reply from the engine's outputs field by field, each in a method of its own.
The wrappers of these methods watch the outputs on their way in and add `diffusion` on the way out:
to every choice, in a stream to the chunk with the choice's `finish_reason`; in `/v1/responses`,
which has one answer, to the response. A request that does not ask goes through vLLM's method
unchanged.
"""

from __future__ import annotations

import inspect
import json
from contextlib import aclosing
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.engine.carriers import telemetry_of
from vllm_diffusion.telemetry import KEY, Telemetry, is_asked

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_DATA: Final = "data: "

_MODULES: Final = tuple(
    f"vllm.entrypoints.openai.{api}.serving"
    for api in ("chat_completion", "completion", "responses")
)


def chat(full: Any) -> Any:
    """Add telemetry in `OpenAIServingChat.chat_completion_full_generator`."""

    async def blocking(self: Any, request: Any, results: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_asked(request.vllm_xargs):
            return await full(self, request, results, *args, **kwargs)
        found: dict[int, Telemetry] = {}
        response = await full(self, request, _watched(results, found), *args, **kwargs)
        _add(response, found)
        return response

    return blocking


def chat_stream(stream: Any) -> Any:
    """Add telemetry in `OpenAIServingChat.chat_completion_stream_generator`."""

    def streamed(
        self: Any, request: Any, results: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        if not is_asked(request.vllm_xargs):
            return stream(self, request, results, *args, **kwargs)
        found: dict[int, Telemetry] = {}
        return _adding(stream(self, request, _watched(results, found), *args, **kwargs), found)

    return streamed


def completion(full: Any) -> Any:
    """Add telemetry in `OpenAIServingCompletion.request_output_to_completion_response`."""

    def blocking(self: Any, results: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = full(self, results, request, *args, **kwargs)
        if is_asked(request.vllm_xargs):
            # vLLM numbers the choices of all prompts in this order.
            outputs = enumerate(output for result in results for output in result.outputs)
            found = {number: telemetry_of(output) for number, output in outputs}
            _add(response, {number: each for number, each in found.items() if each is not None})
        return response

    return blocking


def completion_stream(stream: Any) -> Any:
    """Add telemetry in `OpenAIServingCompletion.completion_stream_generator`."""

    def streamed(
        self: Any, request: Any, inputs: Any, results: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        if not is_asked(request.vllm_xargs):
            return stream(self, request, inputs, results, *args, **kwargs)
        found: dict[int, Telemetry] = {}
        watched = _watched_prompts(results, found, answers=request.n or 1)
        return _adding(stream(self, request, inputs, watched, *args, **kwargs), found)

    return streamed


def responses(full: Any) -> Any:
    """Add telemetry in `OpenAIServingResponses.responses_full_generator`."""

    async def last_object(
        self: Any,
        request: Any,
        sampling: Any,
        results: Any,
        context: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        response = await full(self, request, sampling, results, context, *args, **kwargs)
        # Contexts of models with a format of their own keep no output, and an error has no usage.
        last = vars(context).get("last_output")
        if is_asked(request.vllm_xargs) and last is not None and hasattr(response, "usage"):
            telemetry = telemetry_of(last.outputs[0])
            if telemetry is not None:
                response.diffusion = telemetry.as_dict()
        return response

    return last_object


async def _watched(results: Any, found: dict[int, Telemetry]) -> AsyncGenerator[Any, None]:
    """Pass the outputs of one prompt on and note their telemetry by choice."""
    async with aclosing(results):
        async for result in results:
            _note(result, found, first=0)
            yield result


async def _watched_prompts(
    results: Any, found: dict[int, Telemetry], *, answers: int
) -> AsyncGenerator[Any, None]:
    """The same for a request of several prompts with so many answers each."""
    async with aclosing(results):
        async for prompt, result in results:
            _note(result, found, first=prompt * answers)
            yield prompt, result


def _note(result: Any, found: dict[int, Telemetry], *, first: int) -> None:
    for output in result.outputs:
        if (telemetry := telemetry_of(output)) is not None:
            found[first + output.index] = telemetry


def _add(response: Any, found: dict[int, Telemetry]) -> None:
    """Add the telemetry to the choices of a reply; an error has none."""
    if not hasattr(response, "choices"):
        return
    for choice in response.choices:
        if choice.index in found:
            choice.diffusion = found[choice.index].as_dict()


async def _adding(
    events: AsyncGenerator[str, None], found: dict[int, Telemetry]
) -> AsyncGenerator[str, None]:
    """Pass server-sent events on, with the telemetry where a choice ends."""
    async with aclosing(events):
        async for event in events:
            yield _with_telemetry(event, found)


def _with_telemetry(event: str, found: dict[int, Telemetry]) -> str:
    if not event.startswith(_DATA + "{"):
        return event  # the end of the stream
    chunk = json.loads(event.removeprefix(_DATA))
    ended = [
        choice
        for choice in chunk.get("choices", ())
        if choice.get("finish_reason") and choice["index"] in found
    ]
    if not ended:
        return event
    for choice in ended:
        choice[KEY] = found[choice["index"]].as_dict()
    return f"{_DATA}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


def replies_are_silent() -> bool:
    """Whether vLLM's own modules say nothing of diffusion in a reply."""
    return not any(KEY in inspect.getsource(import_module(each)).lower() for each in _MODULES)
