"""What text that is not causal makes of a user's options; no engine runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from helpers.cases import for_each
from helpers.engines import engine_config

from vllm_diffusion.engine import carriers
from vllm_diffusion.models.llada.testing import checkpoint as llada_maker
from vllm_diffusion.models.sdar.testing import checkpoint as sdar_maker

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="pages are those of CPU hosts"),
]


@pytest.fixture(scope="session")
def sdar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sdar_maker.make_tiny_checkpoint(tmp_path_factory.mktemp("sdar"))


@pytest.fixture(scope="session")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llada_maker.make_tiny_checkpoint(tmp_path_factory.mktemp("llada"))


BLOCKS: list[tuple[dict[str, Any], str]] = [
    ({"max_num_batched_tokens": 7}, "must hold two blocks of 4: raise it to 8 or more"),
    ({"block_size": 36}, "use a multiple of 32, or --no-enable-prefix-caching"),
    ({"hf_overrides": {"block_size": 12}, "block_size": 32}, "use a multiple of 96"),
    ({"prefix_match_unit": 6}, "prefix_match_unit is 6"),
    ({"diffusion_config": {"canvas_length": 8}}, "canvas_length"),
]
WHOLE: list[tuple[dict[str, Any], str]] = [
    ({"max_num_batched_tokens": 511}, "a step must hold a whole request"),
]
BOTH: list[tuple[dict[str, Any], str]] = [
    ({"async_scheduling": True}, "async_scheduling is not supported"),
    ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls="),
    ({"enable_lora": True}, "enable_lora is not supported"),
    ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode=processed_logprobs"),
    ({"additional_config": {"diffusion": {"head_weights": "int8"}}}, "head_weights=int8"),
    ({"additional_config": {"diffusion": {"t_min": 0.5}}}, "has no 't_min'; accepted: preset, "),
]


@for_each(case=[*BLOCKS, *BOTH])
def test_what_text_in_blocks_cannot_be_served_with(
    case: tuple[dict[str, Any], str], sdar: Path
) -> None:
    options, said = case
    with pytest.raises(ValueError, match=said):
        engine_config(sdar, **options)


@for_each(case=[*WHOLE, *BOTH])
def test_what_whole_text_cannot_be_served_with(
    case: tuple[dict[str, Any], str], llada: Path
) -> None:
    options, said = case
    with pytest.raises(ValueError, match=said):
        engine_config(llada, **options)


def test_pages_end_where_blocks_do(sdar: Path) -> None:
    for block, page in ((4, None), (12, 96), (64, None), (5, 160)):
        config = engine_config(sdar, hf_overrides={"block_size": block})
        assert config.cache_config.enable_prefix_caching
        assert config.cache_config.block_size % block == 0
        assert page in {None, config.cache_config.block_size}
    plain = engine_config(sdar, enable_prefix_caching=False, block_size=36)
    assert plain.cache_config.block_size == 36


def test_whole_text_is_not_cached(llada: Path) -> None:
    config = engine_config(llada)
    assert not config.cache_config.enable_prefix_caching
    assert carriers.served(config.model_config.hf_config).canvas_length == 32
    assert not engine_config(llada, enable_prefix_caching=True).cache_config.enable_prefix_caching


def test_a_model_shorter_than_a_canvas_has_rows_for_one(llada: Path) -> None:
    # The pool's canvases are of full width, and the runner's drafts are copied into them.
    assert engine_config(llada, max_model_len=3).diffusion_config.canvas_length == 32
    assert engine_config(llada, max_model_len=70).diffusion_config.canvas_length == 70


def test_several_engines_are_refused_for_experts_alone(sdar: Path, tmp_path: Path) -> None:
    assert engine_config(sdar, data_parallel_size=2).parallel_config.data_parallel_size == 2
    spec = sdar_maker.TinySpec(experts=4)
    experts = sdar_maker.make_tiny_checkpoint(tmp_path, spec)
    with pytest.raises(ValueError, match="with experts"):
        engine_config(experts, data_parallel_size=2)
