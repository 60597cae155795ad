"""The seams by which a malformed request is refused: what vLLM calls them, and what they do."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from vllm_diffusion.patches import malformed_requests, media_errors
from vllm_diffusion.patches.malformed_requests import DEEPEST, refuse
from vllm_diffusion.upstream import core_messages

pytestmark = pytest.mark.vllm

HALF = "\ud800"


def refusal(body: Any) -> str:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as caught:
        refuse(body)
    return str(caught.value)


def lists(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_a_body_is_refused_with_every_place_that_is_wrong():
    said = refusal({"stop": ["a", HALF], "tools": [{"b": {HALF: 1}}], "structured_outputs": "x"})
    assert said == (
        "structured_outputs must be an object, got a text; "
        "stop[1] holds half a surrogate pair, which is no text; "
        "tools[0].b has a name with half a surrogate pair, which is no text "
        "(parameter=structured_outputs)"
    )
    assert refusal([HALF] * 99).count("surrogate") == 8


def test_levels_are_counted_as_a_client_counts_them():
    refuse({"a": lists(DEEPEST - 1)})
    assert f"a{'[0]' * 7}... nests deeper than the {DEEPEST} levels" in refusal(
        {"a": lists(DEEPEST)}
    )


@pytest.mark.parametrize("body", [None, 5, "a", [], {}, {"a": "\u00e9\U0001f600", "b": None}])
def test_other_bodies_are_let_through(body):
    refuse(body)


def test_the_check_is_where_every_server_reads_its_bodies():
    """vLLM builds its application by the function wrapped, and its routes depend on the other."""
    from fastapi import Depends, FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.openai.chat_completion import api_router
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    assert "    init_exception_handler(app)\n" in inspect.getsource(launcher.build_app)
    assert "dependencies=[Depends(validate_json_request)]" in inspect.getsource(api_router)
    original = inspect.unwrap(launcher.init_exception_handler)
    app = FastAPI()
    app.state.args = type("Args", (), {"log_error_stack": False})
    malformed_requests.check_bodies(original)(app)

    @app.post("/", dependencies=[Depends(validate_json_request)])
    async def take() -> str:
        return "taken"

    client = TestClient(app)
    json = {"content-type": "application/json"}
    refused = client.post("/", content='{"stop": "\\ud800"}', headers=json)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "stop")
    assert client.post("/", content='{"stop": "a"}', headers=json).json() == "taken"
    # What is missing is for the route to say.
    assert client.post("/", content="", headers=json).json() == "taken"
    assert client.post("/", content="{}", headers={"content-type": "text/plain"}).is_client_error


def test_nesting_in_a_text_is_the_requests():
    from vllm.exceptions import VLLMValidationError

    async def preprocess_chat(_self: Any, _request: Any) -> None:
        raise RecursionError

    render = malformed_requests.refuse_nested_texts(preprocess_chat)
    with pytest.raises(VLLMValidationError, match="nest too deep"):
        asyncio.run(render(None, None))


@pytest.mark.parametrize(
    ("fields", "beside", "said"),
    [
        ({"top_k": 2**64}, {}, "top_k holds an integer beyond 64 bits"),
        ({"extra_args": {"a": HALF}}, {}, "vllm_xargs.a holds half a surrogate pair"),
        ({"extra_args": {"kv_transfer_params": 1}}, {}, "kv_transfer_params is a field of"),
        ({}, {"priority": 2**64}, "priority holds an integer beyond 64 bits"),
    ],
)
def test_what_no_message_can_say_is_refused_by_name(fields, beside, said):
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=said):
        core_messages.check_message(SamplingParams(**fields), beside)


def test_a_schema_is_no_reason_to_refuse_a_request_and_stays_its_clients():
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = {"maximum": 2**256}
    sampling = SamplingParams(structured_outputs=StructuredOutputsParams(json=schema))
    core_messages.check_message(sampling, {"priority": 0})
    assert sampling.structured_outputs.json == schema


def test_generate_is_told_by_name_what_is_checked_beside_the_parameters():
    from vllm.v1.engine.async_llm import AsyncLLM

    from vllm_diffusion.engine.admission import PASSED_ON

    assert set(PASSED_ON) <= set(inspect.signature(AsyncLLM.generate).parameters)


@pytest.mark.parametrize("error", [OSError("gone"), NotImplementedError("no"), RuntimeError("x")])
def test_a_link_that_leads_nowhere_is_named(error):
    from vllm.exceptions import VLLMValidationError
    from vllm.multimodal.media.connector import MediaConnector
    from vllm.multimodal.media.image import ImageMediaIO

    original = inspect.unwrap(MediaConnector.load_from_url_async)
    assert list(inspect.signature(original).parameters)[:3] == ["self", "url", "media_io"]

    async def load_from_url_async(_self: Any, _url: str, _media_io: Any) -> None:
        raise error

    load = media_errors.blame_the_link(load_from_url_async)
    with pytest.raises(VLLMValidationError) as caught:
        asyncio.run(load(None, "http://" + "a" * 99, ImageMediaIO()))
    assert str(caught.value) == (
        f"'http://{'a' * 57}...' cannot be loaded: {error} (parameter=image_url)"
    )
