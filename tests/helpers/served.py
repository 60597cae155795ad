"""A model's config as it is once serving has put into it what is served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from vllm_diffusion.config import Served
from vllm_diffusion.denoise.constants import EntropyBoundConstants, ServedRules
from vllm_diffusion.engine import carriers
from vllm_diffusion.models.diffusion_gemma.family import declare

if TYPE_CHECKING:
    from vllm_diffusion.family import Family

FAMILY = declare(None, {})


def served_config(family: Family = FAMILY) -> SimpleNamespace:
    """The config of a model of a family; canvas and rule are any."""
    config = SimpleNamespace()
    rule = EntropyBoundConstants(
        max_steps=48,
        t_min=0.4,
        t_max=0.8,
        entropy_bound=0.1,
        confidence_threshold=0.005,
        stability_threshold=1,
    )
    carriers.put_served(
        config,
        Served(
            canvas_length=16,
            rules=ServedRules(default=rule, presets={}),
            family=family,
            head_memory_mb=1,
            head_weights=None,
        ),
    )
    return config
