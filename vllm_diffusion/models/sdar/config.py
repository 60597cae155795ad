"""The configs of model types that Transformers does not know: Qwen3's, and two fields more."""

from __future__ import annotations

from typing import ClassVar

from transformers import Qwen3Config, Qwen3MoeConfig


class SDARConfig(Qwen3Config):
    """Model type ``sdar``; a canvas is a block."""

    model_type = "sdar"
    attribute_map: ClassVar[dict[str, str]] = {
        **Qwen3Config.attribute_map,
        "canvas_length": "block_size",
    }

    block_size: int | None = None
    mask_token_id: int | None = None


class SDARMoeConfig(Qwen3MoeConfig):
    """Model type ``sdar_moe``; a canvas is a block."""

    model_type = "sdar_moe"
    attribute_map: ClassVar[dict[str, str]] = {
        **Qwen3MoeConfig.attribute_map,
        "canvas_length": "block_size",
    }

    block_size: int | None = None
    mask_token_id: int | None = None
