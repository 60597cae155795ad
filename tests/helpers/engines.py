"""Engines that tests share: one of the same checkpoint and options is started once, one lives.

Takes a checkpoint and options of `LLM`. Gives an engine in this process, which a test may look
into, or in processes of its own, as users get it.
"""

from __future__ import annotations

import gc
import json
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm import LLM
    from vllm.config import VllmConfig

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 4096,
    # Without it vLLM takes most of the memory of the host, and refuses to start beside another.
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "disable_log_stats": False,  # tests read the counters
}

SERVER_OPTIONS = tuple(
    f"--{name.replace('_', '-')}" if value is True else f"--{name.replace('_', '-')}={value}"
    for name, value in DEFAULTS.items()
    if name != "disable_log_stats"
)
"""The same for `vllm serve`, whose counters are on anyway."""


def engine_config(checkpoint: Path, **options: Any) -> VllmConfig:
    """What `LLM` or `vllm serve` would hand to the engine, which is not started."""
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 512,
        "enforce_eager": True,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
    }
    return EngineArgs(str(checkpoint), **(defaults | options)).create_engine_config()


class EnginePool:
    """Keeps the engine that was asked for last; asking for another one shuts it down.

    One at a time, because engines in one process share vLLM's distributed state and the host's
    cores. Sort or parametrise tests so that those with equal options follow each other.
    """

    def __init__(self) -> None:
        self._key: str | None = None
        self._llm: LLM | None = None
        self._environment = pytest.MonkeyPatch()

    def get(self, checkpoint: Path, *, in_process: bool = True, **options: Any) -> LLM:
        """The engine of this checkpoint and these options, started if it is not the current one.

        Its prefix cache is empty. An engine that is not `in_process` takes ten seconds longer.
        """
        options = DEFAULTS | options
        key = json.dumps([str(checkpoint), in_process, options], sort_keys=True, default=str)
        if key != self._key:
            self.close()
            self._llm = self._start(checkpoint, in_process, options)
            self._key = key
        assert self._llm is not None
        assert self._llm.reset_prefix_cache(), "a test left requests in a shared engine"
        return self._llm

    def close(self) -> None:
        """Shut the current engine down, if there is one."""
        last = None
        if self._llm is not None:
            # LLM has no close(): a client that is dropped instead may keep its processes.
            self._llm.llm_engine.engine_core.shutdown()
            last = weakref.ref(self._llm)
        self._llm = self._key = None
        gc.collect()
        self._environment.undo()
        if last is None or last() is None:  # what a test still holds must be free to go later
            gc.freeze()

    def _start(self, checkpoint: Path, in_process: bool, options: dict[str, Any]) -> LLM:
        from vllm import LLM

        # vLLM collects garbage some ten times from an engine's start to its end, and unfreezes what
        # `close` froze: every module ever imported. That took most of the time of both.
        for function in ("freeze", "unfreeze"):
            self._environment.setattr(gc, function, lambda: None)
        # Read by vLLM whenever it starts a process, so it stands as long as the engine does.
        self._environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0" if in_process else "1")
        with _scheduled_as_asked(options.get("async_scheduling")):
            llm = LLM(str(checkpoint), **options)
        if "async_scheduling" in options:
            scheduler = llm.llm_engine.vllm_config.scheduler_config
            assert scheduler.async_scheduling is options["async_scheduling"]
        return llm


@contextmanager
def _scheduled_as_asked(ahead: bool | None) -> Iterator[None]:
    """Keep vLLM's CPU platform from switching asynchronous scheduling off, which it need not."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def check_and_update_config(_: type[CpuPlatform], config: VllmConfig) -> None:
        original(config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        if ahead:
            patch.setattr(
                CpuPlatform, "check_and_update_config", classmethod(check_and_update_config)
            )
        yield
