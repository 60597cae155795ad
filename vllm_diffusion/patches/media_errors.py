"""Media that cannot be loaded are the request's mistake, and answered so.

vLLM answers 500 or 501 to a link that leads nowhere, to a file that it may not read, and to a data
URL of another encoding.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_SHOWN: Final = 64
"""Characters of a link that a message repeats."""


def blame_the_link(load: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Make `MediaConnector.load_from_url_async` name the link and what is wrong with it.

    The client is answered with status 400.
    """
    import aiohttp
    from vllm.exceptions import VLLMError, VLLMValidationError
    from vllm.multimodal.media.connector import MODALITY_IO_MAP

    async def blaming(self: Any, url: str, media_io: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await load(self, url, media_io, *args, **kwargs)
        except VLLMError:
            raise
        except (
            aiohttp.ClientError,
            NotImplementedError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            kinds = (kind for kind, io in MODALITY_IO_MAP.items() if isinstance(media_io, io))
            shown = url if len(url) <= _SHOWN else f"{url[:_SHOWN]}..."
            raise VLLMValidationError(
                f"{shown!r} cannot be loaded: {error}", parameter=f"{next(kinds, 'media')}_url"
            ) from error

    return blaming


def links_are_internal_errors() -> bool:
    """Whether vLLM still answers 500 to a link that leads nowhere."""
    import aiohttp
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.multimodal.media.connector import _wrap_media_fetch_error

    met = _wrap_media_fetch_error("http://nowhere.invalid", aiohttp.ClientConnectionError())
    return create_error_response(met).error.code >= HTTPStatus.INTERNAL_SERVER_ERROR
