"""What LLaDA declares: every row sees every row, a canvas is a block, masks ahead are shown.

Facts are those of ML-GSAI/LLaDA: ``generate.py`` (rule, blocks), README.md (iLLaDA's mask), and of
the checkpoints' config.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from vllm_diffusion.errors import CheckpointError
from vllm_diffusion.family import Family, Text
from vllm_diffusion.models.declared import ends_of, mask_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_diffusion.upstream.ledger import Patch

LLADA, ILLADA, MOE = "LLaDAModelLM", "ILLaDAForCausalLM", "LLaDAMoEModelLM"

MODELS: Final = {
    LLADA: "vllm_diffusion.models.llada.model:LLaDAModelLM",
    ILLADA: "vllm_diffusion.models.llada.model:ILLaDAForCausalLM",
    MOE: "vllm_diffusion.models.llada.model:LLaDAMoEModelLM",
}
CONFIGS: Final = {
    "llada": "vllm_diffusion.models.llada.config:LLaDAConfig",
    "illada": "vllm_diffusion.models.llada.config:ILLaDAConfig",
    "lladamoe": "vllm_diffusion.models.llada.config:LLaDAMoEConfig",
}
PATCHES: Final[tuple[Patch, ...]] = ()

MASKS: Final = {ILLADA: 5, MOE: 156895}
"""``mask_id`` of the published calls of ``generate``, where config.json names none."""

BLOCK: Final = 32
"""``block_length`` of the published call of ``generate.py``; ``block_size`` in config.json or
``--hf-overrides`` names another."""

END_OF_TURN: Final = 126348
"""``<|eot_id|>`` of LLaDA's tokenizer, with which an answer in a chat ends; in no config."""

_SERVED: Final[Mapping[str, Mapping[str, tuple[Any, ...]]]] = {
    LLADA: {
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "rope": (True,),
        **dict.fromkeys(
            (
                *("alibi", "attention_layer_norm", "input_emb_norm", "scale_logits"),
                *("include_bias", "include_qkv_bias", "bias_for_layer_norm"),
                "multi_query_attention",
            ),
            (False, None),
        ),
    },
    ILLADA: {"layer_norm_eps": (None,)},
    MOE: {
        "qk_layernorm": (True,),
        "attention_bias": (False,),
        "clip_qkv": (None,),
        "partial_rotary_factor": (1.0,),
        "moe_router_enable_expert_bias": (False,),
        "moe_router_score_function": ("softmax",),
        "routed_scaling_factor": (1.0,),
        "router_num_group": (None, 0, 1),
        "shared_expert_intermediate_size": (0,),
    },
}
"""By architecture: the entries that a model may have several kinds of, and the kind served."""


def declare(config: Any, generation: Mapping[str, Any]) -> Family:
    """See ``family.FamilyModule``."""
    architecture = config.architectures[0]
    refuse_other_kinds(config, architecture)
    mask = mask_of(config, published=MASKS.get(architecture))
    ends = ends_of(config, generation)
    has_turns = architecture == LLADA and config.vocab_size > END_OF_TURN
    unlisted = tuple({END_OF_TURN} - {*ends}) if has_turns else ()
    return Family(
        name="llada",
        rule="reveal",
        mask_id=mask,
        text=Text.WHOLE,
        block=config.block_size,
        horizon=True,
        banned=(mask,),
        ends=(*ends, *unlisted),
        unlisted_ends=unlisted,
        # As many steps as tokens; the confidence that orders them is the model's own.
        published={"max_steps": config.block_size, "reveal_threshold": 0.0, "reveal_by": "model"},
    )


def refuse_other_kinds(config: Any, architecture: str) -> None:
    """Raise CheckpointError where a config asks for what the backbones do not have."""
    wrong = [
        f"{name} is {value!r}, served is {kinds[0]!r}"
        for name, kinds in _SERVED[architecture].items()
        if (value := getattr(config, name)) not in kinds
    ]
    if architecture == LLADA and config.embedding_size not in {None, config.vocab_size}:
        wrong.append(
            f"embedding_size is {config.embedding_size}, but the vocabulary has "
            f"{config.vocab_size} ids"
        )
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        wrong.append(f"the rotary embedding is scaled ({rope}), served is 'default'")
    if wrong:
        raise CheckpointError(f"This {architecture} cannot be served: {'; '.join(wrong)}.")


def settle(vllm_config: Any) -> None:
    """VLLM has no settings for Llama; answers are greedy by default, as ``generate.py`` has it."""
    from vllm_diffusion.models.decoder.settings import settle_decoder

    model = vllm_config.model_config
    settle_decoder(vllm_config, canvas=model.hf_config.block_size)
    override = model.override_generation_config
    if "temperature" not in {**model.try_get_generation_config(), **override}:
        override["temperature"] = 0.0
