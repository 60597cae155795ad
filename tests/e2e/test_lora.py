"""Adapters over HTTP: loaded, listed, asked by name, refused, unloaded, while the server serves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from helpers.engines import SERVER_OPTIONS
from openai import NotFoundError, OpenAI

from vllm_diffusion.models.diffusion_gemma.testing.adapters import DECODER, ONE_STACK, write_adapter
from vllm_diffusion.testing.server import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_diffusion.testing.server import Server

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGA"
    "WjR9awAAAABJRU5ErkJggg=="
)
FINETUNE = Path(__file__).parents[2] / "examples" / "lora" / "finetune.py"

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters, of which `large` has too high a rank.

    `stack`, `half` and `both` have the same factors: of one stack of layers, of the decoder alone,
    of both trees.
    """
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "first", tiny_checkpoint, seed=1)
    write_adapter(folder / "second", tiny_checkpoint, seed=2, alike=False)
    write_adapter(folder / "large", tiny_checkpoint, rank=64)
    only = ("self_attn", "mlp.")
    write_adapter(folder / "both", tiny_checkpoint, seed=3, only=only)
    write_adapter(folder / "half", tiny_checkpoint, seed=3, only=only, trees=(DECODER,))
    write_adapter(folder / "stack", tiny_checkpoint, seed=3, only=only, trees=(ONE_STACK,))
    return folder


@pytest.fixture(scope="module")
def running(
    tiny_checkpoint: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server of a checkpoint without its processor's files, as a fine-tune may be."""
    folder = tmp_path_factory.mktemp("text") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("processor_config.json"))
    options = ("--enable-lora", "--max-loras=2", "--lora-modules", f"first={adapters / 'first'}")
    with serve(
        folder,
        *SERVER_OPTIONS,
        "--served-model-name=tiny",
        *options,
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def raw(running: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as raw:
        yield raw


@pytest.fixture(scope="module")
def openai(raw: httpx.Client) -> Iterator[OpenAI]:
    url = f"{raw.base_url}v1" if str(raw.base_url).endswith("/") else f"{raw.base_url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def answer(openai: OpenAI, model: str) -> str:
    completion = openai.completions.create(
        model=model, prompt="the sea", max_tokens=64, seed=1, extra_body={"ignore_eos": True}
    )
    return completion.choices[0].text


def test_an_adapter_is_loaded_asked_by_name_and_unloaded(
    raw: httpx.Client, openai: OpenAI, adapters: Path
) -> None:
    base, first = answer(openai, "tiny"), answer(openai, "first")
    load = {"lora_name": "second", "lora_path": str(adapters / "second")}
    assert raw.post("/v1/load_lora_adapter", json=load).status_code == 200
    assert {model.id for model in openai.models.list()} == {"tiny", "first", "second"}
    second = answer(openai, "second")
    assert len({base, first, second}) == 3
    assert (answer(openai, "tiny"), answer(openai, "first")) == (base, first)
    assert raw.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 200
    with pytest.raises(NotFoundError):
        answer(openai, "second")


def test_factors_of_one_stack_serve_text_and_canvas_and_half_an_adapter_is_told(
    running: Server, raw: httpx.Client, openai: OpenAI, adapters: Path
) -> None:
    answers = {}
    for name in ("both", "half", "stack"):
        load = {"lora_name": name, "lora_path": str(adapters / name)}
        assert raw.post("/v1/load_lora_adapter", json=load).status_code == 200
        answers[name] = [answer(openai, name) for _ in range(2)]
        assert raw.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code == 200
    assert answers["stack"] == answers["both"]
    assert answers["half"] != answers["both"]
    half, stack = (line for line in running.log().splitlines() if "The adapter '" in line)
    assert "'half' has factors of the decoder alone: rows of prompts and commits run" in half
    assert "'stack', made for " in stack


def test_without_processor_files_text_is_served_and_images_are_refused(
    running: Server, raw: httpx.Client, openai: OpenAI
) -> None:
    """In vLLM a failed warm-up in the log, and status 500."""
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    asked = {"model": "tiny", "max_tokens": 8, "messages": [{"role": "user", "content": parts}]}
    refused = raw.post("/v1/chat/completions", json=asked)
    assert refused.status_code == 400
    assert "this server takes no image" in refused.json()["error"]["message"]
    assert answer(openai, "tiny")
    assert running.log().count("serves only text") == 1


def test_an_adapter_that_does_not_fit_is_a_clients_mistake(
    raw: httpx.Client, openai: OpenAI, adapters: Path
) -> None:
    before = answer(openai, "first")
    load = {"lora_name": "large", "lora_path": str(adapters / "large")}
    refused = raw.post("/v1/load_lora_adapter", json=load)
    assert refused.status_code == 400
    assert "its rank 64 is above 16, see --max-lora-rank" in refused.json()["error"]["message"]
    missing = {"lora_name": "large", "lora_path": str(adapters / "nowhere")}
    assert raw.post("/v1/load_lora_adapter", json=missing).status_code == 400
    with pytest.raises(NotFoundError):
        answer(openai, "large")
    assert answer(openai, "first") == before


def test_the_example_trains_and_serves(tmp_path: Path) -> None:
    """Two steps of it; docs/lora.md says what all of them give."""
    short = ("--steps", "2", "--rows", "1", "--items", "3", "--threads", "1")
    run = subprocess.run(
        [sys.executable, str(FINETUNE), "--out", str(tmp_path), *short],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    said = re.search(r"right answers of 3: base model (\d), with the adapter \d", run.stdout)
    assert said is not None, run.stdout
    assert said[1] == "0"
