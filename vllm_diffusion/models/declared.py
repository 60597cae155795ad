"""What families read of a checkpoint's files in the same way: which ids are which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_diffusion.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping


def mask_of(config: Any, *, published: int | None = None) -> int:
    """The mask token: of the config, else the published one.

    Raises:
        CheckpointError: nothing names it, or the vocabulary does not have it.
    """
    mask = published if config.mask_token_id is None else config.mask_token_id
    if mask is None:
        raise CheckpointError(
            "config.json names no mask_token_id, the token that masked positions hold. Give the "
            """one that the model was trained with, as in --hf-overrides '{"mask_token_id": 5}'."""
        )
    if not 0 <= mask < config.vocab_size:
        raise CheckpointError(
            f"mask_token_id is {mask}, but the vocabulary has {config.vocab_size} ids. Give the "
            """right one, as in --hf-overrides '{"mask_token_id": 5}'."""
        )
    return int(mask)


def ids_of(value: Any) -> tuple[int, ...]:
    """The ids of an entry that is one id, a list of them, or missing."""
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def ends_of(config: Any, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids that end an answer: of the generation config, else of the config."""
    return ids_of(generation.get("eos_token_id")) or ids_of(config.eos_token_id)
