"""One folder a family of models. This file is the only place that lists them.

A folder has ``family.py`` (what the family declares, see ``family.FamilyModule``), ``model.py``,
and whatever else the model needs. ``decoder`` and ``declared`` are what several of them share.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from vllm_diffusion.family import FamilyModule

FAMILIES: Final = {
    "DiffusionGemmaForBlockDiffusion": "vllm_diffusion.models.diffusion_gemma.family",
    "ILLaDAForCausalLM": "vllm_diffusion.models.llada.family",
    "LLaDAMoEModelLM": "vllm_diffusion.models.llada.family",
    "LLaDAModelLM": "vllm_diffusion.models.llada.family",
    "SDARForCausalLM": "vllm_diffusion.models.sdar.family",
    "SDARMoeForCausalLM": "vllm_diffusion.models.sdar.family",
}
"""Architecture, as config.json names it -> the module that declares its family."""


def family_module(architecture: str) -> FamilyModule:
    """The module that declares the family of an architecture of ``FAMILIES``."""
    return cast("FamilyModule", import_module(FAMILIES[architecture]))


def family_modules() -> list[FamilyModule]:
    """Those of all families, each once."""
    return [cast("FamilyModule", import_module(name)) for name in dict.fromkeys(FAMILIES.values())]
