"""Adapters over HTTP: loaded, listed, asked by name, refused, unloaded, while the server serves."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from helpers.engines import SERVER_OPTIONS
from openai import NotFoundError, OpenAI

from vllm_diffusion.testing.adapters import write_adapter
from vllm_diffusion.testing.server import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

FINETUNE = Path(__file__).parents[2] / "examples" / "lora" / "finetune.py"

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def adapters(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters: `first` and `second` fit, `large` has too high a rank."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "first", tiny_checkpoint, seed=1)
    write_adapter(folder / "second", tiny_checkpoint, seed=2, alike=False)
    write_adapter(folder / "large", tiny_checkpoint, rank=64)
    return folder


@pytest.fixture(scope="module")
def raw(tiny_checkpoint: Path, adapters: Path) -> Iterator[httpx.Client]:
    options = ("--enable-lora", "--max-loras=2", "--lora-modules", f"first={adapters / 'first'}")
    with (
        serve(
            tiny_checkpoint,
            *SERVER_OPTIONS,
            "--served-model-name=tiny",
            *options,
            environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
        ) as running,
        httpx.Client(base_url=running.url, timeout=60) as raw,
    ):
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
