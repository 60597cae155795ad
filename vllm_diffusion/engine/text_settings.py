"""What text that is not causal asks of an engine's settings, set or refused before it starts.

    block    text is computed by blocks of a grid: a page of the prefix cache must end where a block
             does, and a step must hold the two blocks that a fused commit takes
    whole    all text is computed in every step: nothing can be cached, and a step must hold all of
             a request

Both need the outcome of a step before the next is planned, because rows are counted by it.
"""

from __future__ import annotations

import logging
from math import lcm
from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from vllm_diffusion.engine.fusion import SCHEDULER
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Text

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_diffusion.family import Family

logger = logging.getLogger(f"vllm.{__name__}")

_CPU_PAGE = 128  # tokens, unless the user says otherwise
_PAGES_OF_CPU = 32  # its attention takes multiples of this alone


def settle_text(vllm_config: VllmConfig, family: Family) -> None:
    """Set what the family's text needs, and refuse settings that prevent it.

    Raises:
        ConfigError: the setting, what is accepted, and the way out.
    """
    if family.text is Text.CAUSAL:
        return
    _refuse(vllm_config, family)
    vllm_config.scheduler_config.async_scheduling = False
    if family.text is Text.BLOCK:
        assert family.block is not None
        _require_rows(vllm_config, 2 * family.block, f"two blocks of {family.block}")
        _settle_pages(vllm_config, family.block)
        return
    _require_rows(
        vllm_config,
        vllm_config.model_config.max_model_len,
        "a whole request (max_model_len), since all of it runs in every step",
    )
    if vllm_config.cache_config.enable_prefix_caching:
        logger.info("Prefix caching is off: in %s every token sees all others.", family.name)
        vllm_config.cache_config.enable_prefix_caching = False


def _refuse(vllm_config: VllmConfig, family: Family) -> None:
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    asked = {
        "async_scheduling": scheduler.async_scheduling,
        f"scheduler_cls={scheduler.scheduler_cls}": scheduler.scheduler_cls
        not in {None, SCHEDULER},
        "kv_transfer_config": vllm_config.kv_transfer_config,
        "sliding_window": model.get_sliding_window(),
    }
    if found := [name for name, value in asked.items() if value]:
        raise ConfigError(
            f"{', '.join(found)} is not supported for {family.name}, whose text is not causal: "
            "remove it."
        )


def _require_rows(vllm_config: VllmConfig, least: int, what: str) -> None:
    for option in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        rows = getattr(vllm_config.scheduler_config, option)
        if rows is not None and rows < least:
            raise ConfigError(
                f"{option} is {rows}, but a step must hold {what}: raise it to {least} or more."
            )


def _settle_pages(vllm_config: VllmConfig, block: int) -> None:
    """Let pages of the prefix cache end where blocks do."""
    cache = vllm_config.cache_config
    if not cache.enable_prefix_caching:
        return
    on_cpu = current_platform.is_cpu()
    units = {
        "block_size": lcm(_PAGES_OF_CPU, block) if on_cpu else block,
        "prefix_match_unit": block,
    }
    for option, unit in units.items():
        page = getattr(cache, option)
        asked = option != "block_size" or cache.user_specified_block_size
        if page is not None and asked and page % unit:
            raise ConfigError(
                f"{option} is {page}, but with prefix caching a page must hold whole blocks of "
                f"{block} tokens, since keys depend on all of their block: use a multiple of "
                f"{unit}, or --no-enable-prefix-caching."
            )
    if cache.user_specified_block_size:
        return
    page = _CPU_PAGE if on_cpu else cache.DEFAULT_BLOCK_SIZE
    if page % block:
        cache.block_size = lcm(_PAGES_OF_CPU if on_cpu else page, block)
        cache.user_specified_block_size = True  # or the platform would put its own
