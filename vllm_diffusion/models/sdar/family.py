"""What SDAR declares: blocks of a grid, text in blocks too, masks that are revealed once.

Facts are those of JetAstra/SDAR: ``generate.py`` (rule, which text sees which) and
``training/model/SDAR-4B-Chat/config.json`` (``block_size``, ``mask_token_id``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.family import Family, Text
from vllm_diffusion.models.declared import ends_of, mask_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.upstream.ledger import Patch

MODELS: Final = {
    "SDARForCausalLM": "vllm_diffusion.models.sdar.model:SDARForCausalLM",
    "SDARMoeForCausalLM": "vllm_diffusion.models.sdar.model:SDARMoeForCausalLM",
}
CONFIGS: Final = {
    "sdar": "vllm_diffusion.models.sdar.config:SDARConfig",
    "sdar_moe": "vllm_diffusion.models.sdar.config:SDARMoeConfig",
}
PATCHES: Final[tuple[Patch, ...]] = ()

REVEAL_THRESHOLD: Final = 0.85
"""``confidence_threshold`` of the default ``low_confidence_dynamic`` in ``generate.py``."""


def declare(config: Any, generation: Mapping[str, Any]) -> Family:
    """See ``family.FamilyModule``."""
    mask, block = mask_of(config), block_of(config)
    return Family(
        name="sdar",
        rule="reveal",
        mask_id=mask,
        text=Text.BLOCK,
        block=block,
        # A mask that is revealed as a mask is a wasted step of the reference.
        banned=(mask,),
        ends=ends_of(config, generation),
        published={
            # denoising_steps of generate.py is the block's length there.
            "max_steps": block,
            "reveal_threshold": REVEAL_THRESHOLD,
            "reveal_by": "drawn",
        },
    )


def block_of(config: Any) -> int:
    """Positions of a block.

    Raises:
        CheckpointError: the config does not say.
    """
    if config.block_size is None:
        raise CheckpointError(
            "config.json names no block_size, which the model was trained with. Give it, as in "
            """--hf-overrides '{"block_size": 4}'."""
        )
    return int(config.block_size)


def settle(vllm_config: Any) -> None:
    """VLLM has no settings for Qwen3; only those of any diffusion model are made."""
    from vllm_diffusion.models.decoder.settings import settle_decoder

    block = block_of(vllm_config.model_config.hf_config)
    settle_decoder(vllm_config, canvas=block)
