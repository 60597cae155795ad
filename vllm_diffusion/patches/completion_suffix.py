"""The suffix of a completion is text on the canvas, behind the answer.

vLLM takes a suffix for models whose tokenizer has a format for it and refuses it for all others; a
canvas needs no format.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.request.options import PREFIX

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SUFFIX: Final = f"{PREFIX}suffix"


def take_suffix(render: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Make `OnlineRenderer.render_completion` take a suffix for a diffusion model as its option."""

    async def rendered(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if request.suffix is not None and self.model_config.is_diffusion:
            if refusal := _no_suffix(request):
                return self.create_error_response(refusal, param="suffix")
            if request.suffix:
                request.vllm_xargs = (request.vllm_xargs or {}) | {SUFFIX: request.suffix}
            request.suffix = None
        return await render(self, request, *args, **kwargs)

    return rendered


def _no_suffix(request: Any) -> str | None:
    """Why a completion request cannot have a suffix, if it cannot."""
    if request.suffix and SUFFIX in (request.vllm_xargs or {}):
        return f"suffix and vllm_xargs.{SUFFIX} both say what follows the answer: keep one"
    others = {"echo": request.echo, "use_beam_search": request.use_beam_search}
    asked = [name for name, is_asked in others.items() if is_asked]
    return f"suffix excludes {', '.join(asked)}" if request.suffix and asked else None


def suffix_is_refused() -> bool:
    """Whether vLLM still has no way but a tokenizer's format for a suffix."""
    from vllm.renderers.online_renderer import OnlineRenderer

    source = inspect.getsource(inspect.unwrap(OnlineRenderer.render_completion))
    return "suffix is only supported for models with FIM" in source
