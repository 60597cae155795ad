"""A constraint compiles while the event loop goes on.

The checks of a request run in the event loop, where everybody waits. So what they need is asked for
before them, where vLLM awaits the rendering of the prompt, and only looked up by them.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

from vllm_diffusion.engine.admission import compile_constraint, refuse_beams

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


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
            refuse_beams(request)
            prompts = result[-1] if isinstance(result, tuple) else result
            # Whatever is wrong is said by the checks.
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                await compile_constraint(self.renderer, request, prompts)
        return result

    return compiling


def requests_are_checked_in_the_loop() -> bool:
    """Whether a rendered request still enters the engine in the event loop."""
    from vllm.v1.engine.async_llm import AsyncLLM

    source = inspect.getsource(AsyncLLM.add_request)
    return "request = self.input_processor.process_inputs(\n" in source
