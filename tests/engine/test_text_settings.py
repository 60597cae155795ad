"""What text that is not causal asks of an engine's settings; no engine runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from helpers.cases import for_each
from helpers.engines import engine_config
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_diffusion.engine import carriers, serving, text_settings
from vllm_diffusion.engine.fusion import SCHEDULER
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Family, Text
from vllm_diffusion.models.llada.testing import checkpoint as llada
from vllm_diffusion.models.sdar.testing import checkpoint as sdar

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.config import VllmConfig

    from vllm_diffusion.config import Served
    from vllm_diffusion.denoise.constants import RevealConstants

pytestmark = pytest.mark.vllm

BLOCK = 8
LIMIT = 256


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("families")
    return {
        "sdar": sdar.make_tiny_checkpoint(made / "sdar", sdar.TinySpec(block=BLOCK)),
        "llada": llada.make_tiny_checkpoint(made / "llada"),
    }


def options_of(family: str, **options: Any) -> dict[str, Any]:
    rows = {"max_num_batched_tokens": 2 * LIMIT, "max_num_seqs": 2, "max_model_len": LIMIT}
    narrow = {"diffusion_config": {"canvas_length": BLOCK}} if family == "llada" else {}
    return {**rows, **narrow, "limit_mm_per_prompt": {}, **options}


@pytest.fixture
def config(checkpoints: dict[str, Path]) -> Any:
    def built(family: str, **options: Any) -> VllmConfig:
        return engine_config(checkpoints[family], **options_of(family, **options))

    return built


def of_block(block: int) -> dict[str, Any]:
    return {"hf_overrides": {"block_size": block}}


def served(config: VllmConfig) -> Served:
    return carriers.served(config.model_config.hf_config)


def rule(config: VllmConfig) -> RevealConstants:
    return served(config).rules.default


def settled(config: VllmConfig) -> tuple[Any, ...]:
    """All that depends on a family's text."""
    cache, scheduler = config.cache_config, config.scheduler_config
    return (
        served(config),
        config.diffusion_config.canvas_length,
        (cache.block_size, cache.enable_prefix_caching),
        (scheduler.max_num_seqs, scheduler.async_scheduling, scheduler.scheduler_cls),
    )


# ---- rows of a step ----


@for_each(option=["max_num_batched_tokens", "max_num_scheduled_tokens"])
def test_a_step_holds_the_two_blocks_of_a_fused_commit(config: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is {2 * BLOCK - 1}, .* two blocks of 8"):
        config("sdar", **{option: 2 * BLOCK - 1})
    built = config("sdar", **{option: 2 * BLOCK})
    assert getattr(built.scheduler_config, option) == 2 * BLOCK


@for_each(option=["max_num_batched_tokens", "max_num_scheduled_tokens"])
def test_a_step_holds_all_text_where_every_row_sees_every_row(config: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} is {LIMIT - 1}, .* raise it to {LIMIT}"):
        config("llada", **{option: LIMIT - 1})
    built = config("llada", **{option: LIMIT})
    assert getattr(built.scheduler_config, option) == LIMIT


# ---- what can be cached, and where its pages end ----


@for_each(page=[12, 20, 36])
def test_a_page_that_cuts_a_block_is_refused_only_where_it_is_shared(
    config: Any, page: int
) -> None:
    with pytest.raises(ValueError, match=f"block_size is {page}, .* multiple of 32, or --no-"):
        config("sdar", block_size=page)
    built = config("sdar", block_size=page, enable_prefix_caching=False)
    assert built.cache_config.block_size == page
    assert not built.cache_config.enable_prefix_caching


@for_each(pages=[(BLOCK, 32), (BLOCK, 64), (BLOCK, 96), (96, 192)])
def test_a_page_of_whole_blocks_is_kept(config: Any, pages: tuple[int, int]) -> None:
    block, page = pages
    built = config("sdar", block_size=page, **of_block(block))
    assert built.cache_config.block_size == page
    assert built.cache_config.enable_prefix_caching


@for_each(block=[4, 8, 64, 96, 256])
def test_nobody_has_to_choose_a_page(config: Any, block: int) -> None:
    built = config("sdar", **of_block(block)).cache_config
    assert built.enable_prefix_caching
    assert built.block_size % block == 0
    assert built.block_size % 32 == 0, "as the CPU backend prefers it"
    assert built.block_size == {96: 96, 256: 256}.get(block, 128), "vLLM's own where it fits"


@for_each(pages=[(4, None), (16, None), (64, 64), (24, 48)])
def test_on_a_gpu_a_block_wider_than_vllms_page_gets_one(
    config: Any, monkeypatch: pytest.MonkeyPatch, pages: tuple[int, int | None]
) -> None:
    block, page = pages
    cache = config("sdar").cache_config
    cache.block_size, cache.user_specified_block_size = None, False
    monkeypatch.setattr(text_settings, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    text_settings._settle_pages(SimpleNamespace(cache_config=cache), block)
    assert cache.DEFAULT_BLOCK_SIZE == 16
    assert (cache.block_size, cache.user_specified_block_size) == (page, page is not None)
    cache.block_size, cache.user_specified_block_size = 5 * block, True
    text_settings._settle_pages(SimpleNamespace(cache_config=cache), block)
    assert cache.block_size == 5 * block
    cache.block_size += 1
    with pytest.raises(ConfigError, match=f"use a multiple of {block}, or"):
        text_settings._settle_pages(SimpleNamespace(cache_config=cache), block)


def test_a_unit_of_prefixes_that_cuts_a_block_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=r"prefix_match_unit is 4, .* whole blocks of 8"):
        config("sdar", block_size=32, prefix_match_unit=4)
    built = config("sdar", block_size=32, prefix_match_unit=16)
    assert built.cache_config.prefix_match_unit == 16
    config("sdar", block_size=32, prefix_match_unit=4, enable_prefix_caching=False)


def test_nothing_is_cached_where_every_row_sees_every_row(config: Any) -> None:
    for asked in ({}, {"enable_prefix_caching": True}, {"block_size": 32}):
        assert not config("llada", **asked).cache_config.enable_prefix_caching


# ---- what cannot be had ----


@for_each(
    family=["sdar", "llada"],
    asked=[
        ("async_scheduling", {"async_scheduling": True}),
        ("scheduler_cls=somebody.Else", {"scheduler_cls": "somebody.Else"}),
        (
            "kv_transfer_config",
            {"kv_transfer_config": KVTransferConfig(kv_connector="X", kv_role="kv_both")},
        ),
        ("sliding_window", {"hf_overrides": {"sliding_window": 32, "use_sliding_window": True}}),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    config: Any, family: str, asked: tuple[str, dict[str, Any]]
) -> None:
    name, options = asked
    with pytest.raises(ValueError, match=f"{name} is not supported for {family}, whose text is"):
        config(family, **options)


@for_each(
    family=["sdar", "llada"],
    asked=[
        ("enable_lora is not supported", {"enable_lora": True}),
        ("logprobs_mode=processed_logprobs", {"logprobs_mode": "processed_logprobs"}),
        ("head_weights=int8", {"additional_config": {"diffusion": {"head_weights": "int8"}}}),
        ("no 't_min'; accepted: preset", {"additional_config": {"diffusion": {"t_min": 0.5}}}),
    ],
)
def test_options_that_the_models_do_not_have_are_refused(
    config: Any, family: str, asked: tuple[str, dict[str, Any]]
) -> None:
    said, options = asked
    with pytest.raises(ValueError, match=said):
        config(family, **options)


def test_several_engines_are_refused_for_experts_alone(config: Any, tmp_path: Path) -> None:
    assert config("sdar", data_parallel_size=2).parallel_config.data_parallel_size == 2
    experts = sdar.make_tiny_checkpoint(tmp_path, sdar.TinySpec(experts=4))
    with pytest.raises(ValueError, match="with experts"):
        engine_config(experts, **options_of("sdar", data_parallel_size=2))


def test_all_that_is_refused_is_named_at_once(config: Any) -> None:
    with pytest.raises(ValueError, match=r"async_scheduling, scheduler_cls=somebody\.Else is not"):
        config("sdar", async_scheduling=True, scheduler_cls="somebody.Else")


@for_each(family=["sdar", "llada"], scheduler=[None, SCHEDULER])
def test_our_scheduler_waits_for_every_step(
    config: Any, family: str, scheduler: str | None
) -> None:
    built = config(family, scheduler_cls=scheduler)
    assert built.scheduler_config.scheduler_cls == SCHEDULER
    assert built.scheduler_config.async_scheduling is False
    # On a CPU host vLLM says so itself; on others None would become True.
    built.scheduler_config.async_scheduling = None
    text_settings.settle_text(built, served(built).family)
    assert built.scheduler_config.async_scheduling is False


def test_causal_text_is_asked_for_nothing() -> None:
    # Not even read: an object without any setting will do.
    text_settings.settle_text(SimpleNamespace(), Family(name="any", rule="entropy_bound"))
    with pytest.raises(AttributeError):
        text_settings.settle_text(
            SimpleNamespace(), Family(name="any", rule="reveal", text=Text.WHOLE)
        )


# ---- widths ----


def test_sdar_keeps_to_the_block_it_was_trained_on(config: Any) -> None:
    for canvas in (4, 16):
        with pytest.raises(ValueError, match=f"canvas_length of {canvas}, .* blocks of 8 tokens"):
            config("sdar", diffusion_config={"canvas_length": canvas})
    for asked in ({}, {"diffusion_config": {"canvas_length": BLOCK}}):
        built = config("sdar", **asked)
        assert served(built).canvas_length == built.diffusion_config.canvas_length == BLOCK
        assert served(built).family.block == rule(built).max_steps == BLOCK
    other = config("sdar", **of_block(4), diffusion_config={"canvas_length": 4})
    assert served(other).canvas_length == served(other).family.block == rule(other).max_steps == 4


def test_llada_is_served_at_any_width_with_as_many_steps(config: Any) -> None:
    for asked, width in (
        ({"diffusion_config": None}, 32),
        ({"diffusion_config": {"canvas_length": 64}}, 64),
        ({"diffusion_config": {"canvas_length": 16}, **of_block(64)}, 16),
        ({"diffusion_config": None, **of_block(64)}, 64),
    ):
        built = config("llada", **asked)
        assert served(built).canvas_length == served(built).family.block == width
        assert rule(built).max_steps == width
        # vLLM's number is that of all rows behind the text.
        assert built.diffusion_config.canvas_length == built.model_config.max_model_len == LIMIT


def test_a_model_shorter_than_a_canvas_has_rows_for_one(config: Any) -> None:
    # The pool's canvases are of full width, and the runner's drafts are copied into them.
    for limit, rows in ((3, BLOCK), (70, 70)):
        assert config("llada", max_model_len=limit).diffusion_config.canvas_length == rows


def test_steps_that_are_asked_for_stay_at_another_width(config: Any) -> None:
    built = config("llada", diffusion_config={"canvas_length": 64, "max_denoising_steps": 16})
    assert served(built).family.block == 64
    assert rule(built).max_steps == 16


@for_each(
    asked=[("sdar", {}), ("sdar", of_block(96)), ("llada", {}), ("llada", of_block(64))],
)
def test_one_set_of_arguments_can_be_built_from_twice(
    checkpoints: dict[str, Path], asked: tuple[str, dict[str, Any]]
) -> None:
    family, options = asked
    wanted = options_of(family, **options)
    arguments = EngineArgs(str(checkpoints[family]), dtype="float32", enforce_eager=True, **wanted)
    first, second = (settled(arguments.create_engine_config()) for _ in range(2))
    assert first == second


@for_each(asked=[("sdar", {}), ("sdar", of_block(96)), ("llada", {}), ("llada", of_block(64))])
def test_what_is_settled_stays(config: Any, asked: tuple[str, dict[str, Any]]) -> None:
    family, options = asked
    built = config(family, **options)
    before = settled(built)
    serving.CanvasServing.verify_and_update_config(built)
    assert settled(built) == before


def test_refusals_are_our_own_error(config: Any) -> None:
    family = Family(name="any", rule="reveal", text=Text.BLOCK, block=BLOCK)
    built = config("sdar")
    built.scheduler_config.max_num_batched_tokens = BLOCK
    with pytest.raises(ConfigError, match="max_num_batched_tokens is 8"):
        text_settings.settle_text(built, family)
