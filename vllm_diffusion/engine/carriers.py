"""Where our data travels in vLLM's objects: every borrowed place, and who puts and takes what.

vLLM hands what it knows from process to process in records of fixed fields. What we have to say
beside them rides in these places; nothing of ours rides anywhere else.

    what            place                              put by              taken by
    Served          hf_config.vllm_diffusion           engine.serving      everyone

This module knows the places and nothing of what becomes of their contents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from vllm_diffusion.config import Served

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SERVED: Final = "vllm_diffusion"


def put_served(hf_config: PretrainedConfig, what: Served) -> None:
    """Let every process that gets the model's config know what is served.

    A config is written as JSON, so it holds plain values. vLLM itself reads the width of a canvas
    from the config, and it is one for all.
    """
    hf_config.canvas_length = what.canvas_length
    setattr(hf_config, _SERVED, what.to_dict())


def served(hf_config: PretrainedConfig) -> Served:
    """What is served with a model's config.

    Raises:
        AttributeError: it is not a model of ours.
    """
    return Served.from_dict(getattr(hf_config, _SERVED))


def is_served(hf_config: PretrainedConfig) -> bool:
    """Whether a model's config has been served before, or is."""
    return hasattr(hf_config, _SERVED)
