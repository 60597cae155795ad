"""Image and text processing: Gemma 4's, told which config class it reads."""

from __future__ import annotations

from transformers import DiffusionGemmaConfig
from vllm.model_executor.models.gemma4_mm import Gemma4ProcessingInfo


class DiffusionGemmaProcessingInfo(Gemma4ProcessingInfo):
    """Gemma 4's processing facts for a checkpoint without an audio tower."""

    def get_hf_config(self) -> DiffusionGemmaConfig:
        """The checkpoint's config; raises if it is of another model."""
        return self.ctx.get_hf_config(DiffusionGemmaConfig)

    def has_audio(self) -> bool:
        """DiffusionGemma hears nothing."""
        return False
