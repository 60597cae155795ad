"""An engine whose head reads a copy of its matrix in fewer bits answers as the exact one does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from vllm import SamplingParams

from vllm_diffusion.head import vocabulary
from vllm_diffusion.testing.tasks import TASKS, held_out_items, solved

if TYPE_CHECKING:
    from conftest import EngineFactory
    from vllm import LLM

pytestmark = pytest.mark.vllm

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-diffusiongemma"
OPTIONS: dict[str, Any] = {
    "limit_mm_per_prompt": {"image": 0, "video": 0},
    "additional_config": {"diffusion": {"head_weights": "nvfp4"}},
}


def sampler_of(llm: LLM) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.sampler


def answers(llm: LLM) -> list[Any]:
    items = [
        item
        for task in ("json", "edit")
        for item in held_out_items(task, 4, seed=1, sizes=TASKS[task].easy)
    ]
    asked = [[{"role": "user", "content": item.prompt}] for item in items]
    sampling = [SamplingParams(max_tokens=128, seed=number) for number in range(len(items))]
    made = llm.chat(asked, sampling, use_tqdm=False)
    right = [solved(item, one.outputs[0].text) for item, one in zip(items, made, strict=True)]
    assert sum(right) >= len(items) - 1
    return [one.outputs[0] for one in made]


def test_it_says_so_and_answers(engine_pool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(vocabulary.logger, "info", lambda text, *of: said.append(text % of))
    engine_pool.close()  # the line is said at start
    llm = engine_pool.get(CHECKPOINT, **OPTIONS)
    (line,) = said
    assert "a copy of its matrix in nvfp4: 0.0" in line
    assert "of torch.float32; the 16 best ids of a row are scored exactly" in line

    quantised = answers(llm)
    sampler = sampler_of(llm)
    head = sampler.head
    assert head.vocabulary.copy.form == "nvfp4"
    sampler.head = replace(head, vocabulary=replace(head.vocabulary, copy=None))
    exact = answers(llm)
    sampler.head = head
    assert [one.token_ids for one in quantised] == [one.token_ids for one in exact]


def test_loading_weights_again_changes_the_copy(engine: EngineFactory) -> None:
    llm = engine(CHECKPOINT, **OPTIONS)
    before = answers(llm)
    copy = sampler_of(llm).head.vocabulary.copy
    made = copy._copy
    llm.collective_rpc("reload_weights")
    assert [one.token_ids for one in answers(llm)] == [one.token_ids for one in before]
    assert copy._copy is not made, "the copy is of the old weights"
