"""Image and text processing: Gemma 4's, told which config class it reads."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from transformers import DiffusionGemmaConfig
from vllm.model_executor.models.gemma4_mm import Gemma4ProcessingInfo
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import ModelConfig


def tower_config(model_config: ModelConfig) -> Any | None:
    """The vision tower's config; None where the checkpoint has no tower.

    Where config.json has no tower, Transformers from 5.24 on makes one up, so the file decides.
    """
    described = model_config.hf_config.vision_config
    source = model_config.hf_config_path or model_config.model
    return described if _file_has_tower(source, model_config.revision) else None


@cache
def _file_has_tower(source: str, revision: str | None) -> bool:
    """Whether config.json describes a tower; True where there is no such file."""
    written = get_hf_file_to_dict("config.json", source, revision)
    return written is None or written.get("vision_config") is not None


class DiffusionGemmaProcessingInfo(Gemma4ProcessingInfo):
    """What Gemma 4's processor is told: no audio tower, and maybe no vision tower."""

    def get_hf_config(self) -> DiffusionGemmaConfig:
        """The checkpoint's config; raises if it is of another model."""
        return self.ctx.get_hf_config(DiffusionGemmaConfig)

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Raise `ValueError` for more than are taken, and name why where that is none at all."""
        if num_items and not self.ctx.get_mm_config().get_limit_per_prompt(modality):
            raise ValueError(
                f"this server takes no {modality}: it was started so (--limit-mm-per-prompt, "
                "--language-model-only), or its checkpoint has no processor files and it serves "
                "text alone; its log says which."
            )
        super().validate_num_items(modality, num_items)

    def has_audio(self) -> bool:
        """There is no audio tower."""
        return False

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images and video without limit, or nothing where no tower could see them."""
        return super().get_supported_mm_limits() if tower_config(self.ctx.model_config) else {}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int] | None:
        """Rows of the largest image and video; None where there are no such things."""
        if not self.supported_mm_limits:
            return None
        return super().get_mm_max_tokens_per_item(seq_len, mm_counts)
