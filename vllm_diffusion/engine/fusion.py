"""Fused commits: the commit rows of a finished canvas share a forward with its successor.

    separate   ... last step | commit: tokens leave | first step of the next canvas ...
    fused      ... last step: tokens leave | commit and first step of the next canvas ...

The tokens are the same; a canvas costs a forward less, and the last one of a request is not
committed at all, since nobody will look at it. Scheduler and worker both account for it, so both
ask here, and get the same answer.

A step that was scheduled before the result of the last is known, as asynchronous scheduling does,
has rows for either a commit or a canvas: fused commits need synchronous scheduling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.config import fused_commit
from vllm_diffusion.params import PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig

SCHEDULER: Final = "vllm_diffusion.engine.scheduler.canvas_scheduler"
"""The scheduler that accounts for fused commits; another one would lose tokens."""

_OPTION: Final = f"{PREFIX}fused_commit"


@dataclass(frozen=True, slots=True)
class Fusion:
    """What an engine does with the commits of its requests."""

    why_not: str | None
    """Why no commit can be fused; None if it can."""
    served: bool
    """Whether those of a request that does not say are to be."""

    @staticmethod
    def of(vllm_config: VllmConfig) -> Fusion:
        """Read it from an engine's config, complete as scheduler and worker see it."""
        scheduler, additional = vllm_config.scheduler_config, vllm_config.additional_config
        why_not = None
        if scheduler.async_scheduling:
            why_not = "scheduling is asynchronous (--no-async-scheduling)"
        elif scheduler.scheduler_cls != SCHEDULER:
            why_not = f"scheduler_cls is {scheduler.scheduler_cls}"
        options = additional.get("diffusion") if isinstance(additional, dict) else None
        return Fusion(why_not=why_not, served=fused_commit(options))

    def holds_for(self, extra_args: Mapping[str, Any] | None) -> bool:
        """Whether the commits of a request with these options are fused."""
        asked = (extra_args or {}).get(_OPTION)
        return self.why_not is None and bool(self.served if asked is None else asked)
