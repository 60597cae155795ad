"""What DiffusionGemma declares: causal text, uniform noise, a canvas that conditions itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.family import Conditioning, Family
from vllm_diffusion.models.declared import ids_of
from vllm_diffusion.models.diffusion_gemma import patches

if TYPE_CHECKING:
    from collections.abc import Mapping

MODELS: Final = {
    "DiffusionGemmaForBlockDiffusion": (
        "vllm_diffusion.models.diffusion_gemma.model:DiffusionGemmaForBlockDiffusion"
    )
}
CONFIGS: Final[Mapping[str, str]] = {}  # Transformers has it
PATCHES: Final = patches.PATCHES


def declare(config: Any, generation: Mapping[str, Any]) -> Family:
    """See ``family.FamilyModule``."""
    del config
    return Family(
        name="diffusion_gemma",
        rule="entropy_bound",
        conditioning=Conditioning.SELF,
        tools="vllm_diffusion.models.diffusion_gemma.tools.calls:call_grammar",
        adapters="vllm_diffusion.models.diffusion_gemma.adapter_form:FORM",
        ends=ids_of(generation.get("eos_token_id")),
    )


def settle(vllm_config: Any) -> None:
    """The attention backend for heads of two widths, and no cap on the length of an answer."""
    from vllm.model_executor.models.config import DiffusionGemmaModelForBlockDiffusionConfig

    DiffusionGemmaModelForBlockDiffusionConfig.verify_and_update_config(vllm_config)
