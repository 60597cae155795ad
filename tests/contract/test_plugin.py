"""register(): what it takes over, what it leaves alone, and that it can be called again.

In processes of their own: registration changes vLLM for the rest of a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.vllm

STATE = """
import json
lines = []
from vllm.plugins import load_general_plugins
load_general_plugins()
{extra}
from vllm import ModelRegistry, SamplingParams
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.config.vllm import VllmConfig
architecture = "DiffusionGemmaForBlockDiffusion"
registered = ModelRegistry.models[architecture]
print(json.dumps({{
    "model": registered.module_name,
    "config": MODELS_CONFIG_MAP[architecture].__module__,
    "checks": SamplingParams._validate_diffusion.__module__,
    "wrapped": hasattr(SamplingParams._validate_diffusion, "__wrapped__"),
    "twice": hasattr(
        getattr(SamplingParams._validate_diffusion, "__wrapped__", None), "__wrapped__"
    ),
    "llama": ModelRegistry.models["LlamaForCausalLM"].module_name,
    "lines": lines,
}}))
"""


def state(extra: str = "", **environment: str) -> dict[str, object]:
    result = subprocess.run(
        [sys.executable, "-c", STATE.format(extra=extra)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    answer: dict[str, object] = json.loads(result.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def registered() -> dict[str, object]:
    return state()


def test_the_architecture_is_ours(registered: dict[str, object]) -> None:
    assert registered["model"] == "vllm_diffusion.models.diffusion_gemma.model"
    assert registered["config"] == "vllm_diffusion.engine.serving"
    assert registered["wrapped"]


def test_other_architectures_are_not(registered: dict[str, object]) -> None:
    assert str(registered["llama"]).startswith("vllm.model_executor.models")


def test_one_line_says_what_is_active(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_diffusion.engine import serving

    # At the logger itself: an engine started earlier in this process may have set vLLM's level.
    said: list[str] = []
    monkeypatch.setattr(serving.logger, "info", lambda text, *args: said.append(text % args))
    EngineArgs(str(tiny_checkpoint), max_model_len=256).create_engine_config()
    (line,) = said
    for word in ("DiffusionGemmaForBlockDiffusion", "canvas of 32", "request-validation"):
        assert word in line


def test_registering_again_changes_nothing(registered: dict[str, object]) -> None:
    again = state("from vllm_diffusion.plugin import register; register(); register()")
    assert again == registered
    assert not again["twice"]


def test_the_off_switch_leaves_native_vllm() -> None:
    off = state(VLLM_DIFFUSION="0")
    assert off["model"] == "vllm.model_executor.models.diffusion_gemma"
    assert off["config"] == "vllm.model_executor.models.config"
    assert not off["wrapped"]


def test_a_vllm_out_of_range_is_refused_in_one_sentence() -> None:
    extra = """
from vllm_diffusion import plugin
from vllm_diffusion.errors import UnsupportedVllmError
from vllm_diffusion.upstream import versions
plugin._registered = False
found = versions.InstalledVllm(version="0.40.0", distributions=("vllm",))
versions.installed_vllm = lambda: found
try:
    plugin.register()
except UnsupportedVllmError as error:
    lines.append(str(error))
"""
    message = str(state(extra)["lines"][-1])
    assert "0.40.0" in message
    assert "0.32" in message
    assert "VLLM_DIFFUSION=0" in message
