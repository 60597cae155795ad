"""A body that no request can have is refused before anything reads it.

JSON can write what no tokenizer reads, half a surrogate pair, and what nobody walks who calls
himself for every level. vLLM meets both wherever it happens to, as an error of its own. Here the
body is looked through once, where vLLM looks at its content type, and the refusal says where.
"""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from fastapi import FastAPI, Request

DEEPEST: Final = 80
"""Levels of objects and lists in a body: the 64 of vLLM's for a schema, and what is around it."""

_SHOWN: Final = 8
"""Problems that one message names."""

_LONGEST: Final = 64
"""Characters of a name that a message repeats."""

_STEEPEST: Final = 50
"""Largest power of a beam's length, either way: that of a million tokens is still a float."""

_OBJECTS: Final = ("structured_outputs",)
"""Fields that vLLM asks for a member before it has looked whether they have any."""


def check_bodies(init_exception_handler: Callable[..., None]) -> Callable[..., None]:
    """Give every server the check: where `vllm.entrypoints.launchers.app` builds it."""
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    # FastAPI reads what it must pass from the signature, which is that of the function wrapped.
    @functools.wraps(validate_json_request)
    async def checked(raw_request: Request) -> None:
        await validate_json_request(raw_request)
        if await raw_request.body():
            refuse(await raw_request.json())

    def init(app: FastAPI) -> None:
        init_exception_handler(app)
        app.dependency_overrides[validate_json_request] = checked

    return init


def refuse_nested_texts(render: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Make `OnlineRenderer.preprocess_chat` refuse what nests too deep for a prompt.

    The arguments of a call are JSON in a text, where nobody has counted levels, and what a chat
    template does with a tool is its own affair.
    """
    from vllm.exceptions import VLLMValidationError

    async def rendered(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await render(self, *args, **kwargs)
        except RecursionError as error:
            raise VLLMValidationError(
                "messages (the arguments of a call in them), tools or chat_template_kwargs nest "
                "too deep to be written into a prompt",
                parameter="messages",
            ) from error

    return rendered


def refuse(body: object) -> None:
    """Look through the body of a request.

    Args:
        body: what its JSON says.

    Raises:
        VLLMValidationError: something in it that no request can have; all of it, up to a few.
    """
    from vllm.exceptions import VLLMValidationError

    problems: list[str] = []
    first: str | None = None
    for path, problem in _problems(body):
        first = first or path
        if len(problems) == _SHOWN:
            problems.append("and more")
            break
        problems.append(f"{path} {problem}")
    if problems:
        raise VLLMValidationError("; ".join(problems), parameter=first)


def _problems(body: object) -> Iterator[tuple[str, str]]:
    """Where something is wrong, and what."""
    if isinstance(body, dict):
        for name in _OBJECTS:
            if not isinstance(body.get(name), dict | None):
                yield name, f"must be an object, got {_kind(body[name])}"
        power = body.get("length_penalty") if body.get("use_beam_search") else None
        if isinstance(power, int | float) and not abs(power) <= _STEEPEST:
            yield "length_penalty", f"must be -{_STEEPEST} to {_STEEPEST}"
    for path, problem in _inside(body, (), 1):
        yield _written(path), problem


def _inside(value: object, path: tuple[Any, ...], level: int) -> Iterator[tuple[Any, str]]:
    """What is wrong with a value or anything in it; a path is (path of the outer one, name)."""
    if isinstance(value, str):
        if not _is_text(value):
            yield path, "holds half a surrogate pair, which is no text"
    elif isinstance(value, dict | list):
        if level > DEEPEST:
            yield path, f"nests deeper than the {DEEPEST} levels that a request may have"
            return
        if isinstance(value, dict) and not all(map(_is_text, value)):
            yield path, "has a name with half a surrogate pair, which is no text"
            return
        named = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in named:
            # Numbers have no parts, and prompts can be long lists of them.
            if isinstance(item, str | dict | list):
                yield from _inside(item, (path, name), level + 1)


def _is_text(value: str) -> bool:
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _written(path: tuple[Any, ...]) -> str:
    """A path as its client would write it, the far end of a long one left out."""
    names: list[str] = []
    while path:
        path, name = path
        names.append(f"[{name}]" if isinstance(name, int) else f".{name[:_LONGEST]}")
    names.reverse()
    return "".join(names[:_SHOWN]).removeprefix(".") + ("..." if len(names) > _SHOWN else "")


def _kind(value: object) -> str:
    """The JSON name of a value's type."""
    names = {bool: "a boolean", str: "a text", list: "a list"}
    return names.get(type(value), "a number")


def nesting_is_an_internal_error() -> bool:
    """Whether vLLM still answers 500 where something recurses."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    return create_error_response(RecursionError()).error.code >= HTTPStatus.INTERNAL_SERVER_ERROR


def malformed_bodies_are_let_in() -> bool:
    """Whether vLLM still takes half a surrogate pair for text."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    return CompletionRequest(prompt="a", stop="\ud800").stop == "\ud800"
