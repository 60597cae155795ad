"""Whether a request fits into a message to the engine's core, asked before its answer begins.

The core is another process. vLLM encodes a request for it when the answer is first asked for. What
msgpack cannot encode, such as an integer beyond 64 bits, is then an internal error without a text.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Options that vLLM fills from fields of the request, and whose members it reads unchecked.
_OBJECTS: Final = ("kv_transfer_params", "ec_transfer_params")


def check_message(sampling: Any, beside: Mapping[str, Any]) -> None:
    """Refuse a request that cannot be encoded for the engine's core.

    Args:
        sampling: the request's SamplingParams.
        beside: what else is sent, by the names that clients use.

    Raises:
        VLLMValidationError: something cannot be encoded; the message names it.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.serial_utils import MsgpackEncoder

    for name in _OBJECTS:
        if not isinstance((sampling.extra_args or {}).get(name), dict | None):
            raise VLLMValidationError(
                f"vllm_xargs.{name} is no object: {name} is a field of the request itself",
                parameter="vllm_xargs",
            )
    encode = MsgpackEncoder().encode
    sent = copy.copy(sampling)
    # A constraint is sent compiled, and JSON has integers of any size.
    sent.structured_outputs = None
    try:
        encode([sent, beside])
    except (OverflowError, TypeError, ValueError, RecursionError):
        for name, value in _parts(sent, beside):
            try:
                encode(value)
            except (OverflowError, TypeError, ValueError, RecursionError) as error:
                raise VLLMValidationError(
                    f"{name} {_reason(error)}", parameter=name.partition(".")[0]
                ) from error
        raise


def _parts(sampling: Any, beside: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every field of a request, by the name that clients use."""
    for field in sampling.__struct_fields__:
        value = getattr(sampling, field)
        if field == "extra_args":
            yield from ((f"vllm_xargs.{option}", each) for option, each in (value or {}).items())
        else:
            yield field, value
    yield from beside.items()


def _reason(error: Exception) -> str:
    if isinstance(error, OverflowError):
        return "holds an integer beyond 64 bits"
    if isinstance(error, UnicodeEncodeError):
        return "holds half a surrogate pair, which is no text"
    if isinstance(error, RecursionError):
        return "nests too deep"
    return f"cannot be told to the engine: {error}"
