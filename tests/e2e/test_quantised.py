"""`vllm serve` answers from quantised checkpoints on a CPU host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.engines import SERVER_OPTIONS
from openai import OpenAI

from vllm_diffusion.quant import native
from vllm_diffusion.testing.quantise import quantise_checkpoint
from vllm_diffusion.testing.server import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.server, pytest.mark.slow]

TRAINED = Path(__file__).parents[2] / "examples" / "tiny-diffusiongemma"

QUESTION = "Rosa from Madrid works as a clerk at 55."
ANSWER = '[{"name":"Rosa","age":55,"city":"Madrid","job":"clerk"}]'


@pytest.fixture(params=["fp8-dynamic", "nvfp4"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """What a server of the trained checkpoint in a released form says, when it has answered."""
    folder = quantise_checkpoint(TRAINED, tmp_path, request.param)
    # In bf16, as released checkpoints are served.
    options = [one for one in SERVER_OPTIONS if "dtype" not in one]
    with serve(folder, *options, "--served-model-name", "tiny") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
        with client:
            reply = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=64
            )
        assert reply.choices[0].message.content == ANSWER
        yield server.log()


def test_the_trained_checkpoint_answers(log: str):
    kept = "weights stay packed" if native.library() else "weights are dequantised"
    assert log.count(kept) == 1
