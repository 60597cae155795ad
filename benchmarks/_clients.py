"""Valid and invalid client requests of every kind, for `soak.py`.

A request lists the accepted statuses and, if it has a constraint, how to validate the answer. New
constraints differ from all those sent before.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.testing.constraints import PROMPTS, draw_constraint

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

MODEL: Final = "tiny"
_HASTY: Final = {"diffusion_max_steps": 6}
_new = count()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, and what is right."""

    sort: str
    path: str
    body: Any
    right: frozenset[int] = frozenset({200})
    accepts: Callable[[str], bool] | None = None
    """Judges a complete text."""
    leaves_after: float | None = None
    """Seconds until the client hangs up."""


def requests(rng: random.Random, number: int, new_schemas: int) -> Iterator[Request]:
    """A mix of them, ``new_schemas`` of them with a constraint that nobody has sent before."""
    new = {*rng.sample(range(number), new_schemas)}
    for index in range(number):
        yield rng.choice(_NEW if index in new else _OTHERS)(rng)


def _chat(rng: random.Random, **options: object) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": rng.choice(PROMPTS)}],
        "max_tokens": rng.choice((16, 48, 100)),
        "seed": rng.randrange(1000),
        "vllm_xargs": _HASTY,
        **options,
    }


def _plain(rng: random.Random) -> Request:
    return Request(sort="chat", path="/v1/chat/completions", body=_chat(rng))


def _streamed(rng: random.Random) -> Request:
    return Request(sort="chat, streamed", path="/v1/chat/completions", body=_chat(rng, stream=True))


def _parameters(rng: random.Random) -> Request:
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "logprobs": True, "top_logprobs": 2}
    return Request(
        sort="sampling parameters",
        path="/v1/chat/completions",
        body=_chat(rng, **dict(rng.sample(sorted(options.items()), 2)), logit_bias={"7": -3}),
        right=frozenset({200, 400}),  # top_logprobs without logprobs
    )


def _completion(rng: random.Random) -> Request:
    body = {"model": MODEL, "prompt": [rng.choice(PROMPTS)] * 2, "max_tokens": 24, "seed": 1}
    return Request(sort="completion", path="/v1/completions", body={**body, "vllm_xargs": _HASTY})


def _responses(rng: random.Random) -> Request:
    body = {"model": MODEL, "input": rng.choice(PROMPTS), "max_output_tokens": 32}
    return Request(sort="responses", path="/v1/responses", body=body)


def _messages(rng: random.Random) -> Request:
    messages = [{"role": "user", "content": rng.choice(PROMPTS)}]
    body = {"model": MODEL, "max_tokens": 32, "messages": messages}
    return Request(sort="messages", path="/v1/messages", body=body)


def _template(rng: random.Random) -> Request:
    xargs = {**_HASTY, "diffusion_template": ["The sea is ", 6, " and ", 4, "."]}
    body = _chat(rng, max_tokens=48, vllm_xargs=xargs)
    return Request(sort="template", path="/v1/chat/completions", body=body)


def _image(rng: random.Random) -> Request:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (24, 24), (rng.randrange(256), 30, 90)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    body = _chat(rng, messages=[{"role": "user", "content": content}])
    return Request(sort="image", path="/v1/chat/completions", body=body)


def _leaves(rng: random.Random) -> Request:
    body = _chat(rng, stream=True, max_tokens=400, vllm_xargs={})
    return Request(
        sort="leaves",
        path="/v1/chat/completions",
        body=body,
        leaves_after=rng.uniform(0.05, 0.4),
    )


_FUNCTION: Final = {
    "name": "find",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string"},
            "limit": {"type": "integer", "minimum": 1, "maximum": 50},
            "kind": {"enum": ["shop", "park"]},
        },
        "required": ["place"],
    },
}


def _tools(rng: random.Random) -> Request:
    choice = rng.choice(("required", "auto", {"type": "function", "function": {"name": "find"}}))
    tools = [{"type": "function", "function": {**_FUNCTION, "strict": True}}]
    return Request(
        sort="tools",
        path="/v1/chat/completions",
        body=_chat(rng, max_tokens=100, tools=tools, tool_choice=choice),
    )


def _known_schema(rng: random.Random) -> Request:
    form = {"name": "known", "schema": {**_FUNCTION["parameters"], "additionalProperties": False}}
    return Request(
        sort="known schema",
        path="/v1/chat/completions",
        body=_chat(rng, response_format={"type": "json_schema", "json_schema": form}),
    )


_WRONG: Final[tuple[dict[str, Any], ...]] = (
    {"structured_outputs": {"regex": "(a"}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"json": {"type": "nothing"}}},
    {"structured_outputs": {"json": {"type": "string", "minLength": 100000}}},
    {"vllm_xargs": {"diffusion_max_steps": 0}},
    {"vllm_xargs": {"diffusion_template": ["a", 1 << 63]}},
    {"stop_token_ids": [1 << 40], "structured_outputs": {"choice": ["a"]}},
    {"top_k": 10**20},
    {"stop": ["\ud800"]},
    {"temperature": -1},
    {"messages": "x"},
    {"logit_bias": {"99999999": 1}},
)


def _wrong(rng: random.Random) -> Request:
    return Request(
        sort="wrong",
        path="/v1/chat/completions",
        body=_chat(rng) | rng.choice(_WRONG),
        right=frozenset({400}),
    )


def _new_constraint(rng: random.Random) -> Request:
    drawn = draw_constraint(rng)
    value = drawn.value
    if drawn.kind == "json":
        value = value if isinstance(value, str) else json.dumps(value)
        value = json.dumps({**json.loads(value), "description": f"number {next(_new)}"})
    asked = {drawn.kind: value}
    return Request(
        sort=f"new {drawn.kind}",
        path="/v1/chat/completions",
        body=_chat(rng, structured_outputs=asked),
        right=frozenset({200, 400}),  # not every one has a text that is short enough
        accepts=drawn.accepts,
    )


def _new_tools(rng: random.Random) -> Request:
    properties = {f"field{index}": {"type": "string"} for index in range(rng.randrange(3, 12))}
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"job{number}_{next(_new)}",
                "parameters": {"type": "object", "properties": properties},
            },
        }
        for number in range(rng.randrange(1, 20))
    ]
    return Request(
        sort="new tools",
        path="/v1/chat/completions",
        body=_chat(rng, max_tokens=100, tools=tools, tool_choice="required"),
    )


def _tree(depth: int) -> dict[str, Any]:
    if not depth:
        return {"type": "string"}
    half = _tree(depth - 1)
    return {
        "type": "object",
        "properties": {"left": half, "right": half},
        "required": ["left", "right"],
        "additionalProperties": False,
    }


def _heavy(rng: random.Random) -> Request:
    """Seconds to compile, or too large, or long: whatever comes of it, others do not wait."""
    number = next(_new)
    schema = rng.choice(
        (
            {"type": "object", "properties": {f"a{number}": {"type": "string", "maxLength": 2000}}},
            {**_tree(6), "description": f"{number}"},
            {"enum": [f"{number} {rng.random()}" for _ in range(5000)]},
            {"not": {}, "description": f"{number} " + "x" * 2_000_000},
            {
                "type": "object",
                "properties": {f"b{number} {i}": {"type": "string"} for i in range(40)},
            },
        )
    )
    form = {"type": "json_schema", "json_schema": {"name": "heavy", "schema": schema}}
    return Request(
        sort="heavy schema",
        path="/v1/chat/completions",
        body=_chat(rng, response_format=form),
        right=frozenset({200, 400}),
    )


_NEW: Final = (*[_new_constraint] * 6, _new_tools, _heavy)
_OTHERS: Final = (
    *[_plain, _streamed, _known_schema] * 3,
    *(_parameters, _completion, _responses, _messages, _template, _image, _leaves, _tools),
    *(_wrong, _tools),
)
