"""Settings that diffusion models cannot be served with, refused before an engine starts.

Each function raises ``ConfigError`` with the requested value, what is accepted and the way out.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from vllm_diffusion.config import HEAD_WEIGHTS
from vllm_diffusion.engine import carriers
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Conditioning
from vllm_diffusion.quant import int8
from vllm_diffusion.quant.packed import GROUP

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.config.scheduler import SchedulerConfig

    from vllm_diffusion.family import Family
    from vllm_diffusion.head.output_copy import HeadForm

logger = logging.getLogger(f"vllm.{__name__}")

_FP8 = 89  # least compute capability of torch's fp8 products
_FP8_GROUP = 16  # their ids and inputs must be multiples of this


def refuse_attention_of_gpus(vllm_config: VllmConfig) -> None:
    """Refuse attention backends that a CPU host lacks; vLLM itself only logs the choice."""
    asked = vllm_config.attention_config.backend
    if (
        current_platform.is_cpu()
        and asked not in {None, AttentionBackendEnum.CPU_ATTN}
        # vLLM's settings for a backbone may have named one when this config was made before.
        and not carriers.is_served(vllm_config.model_config.hf_config)
    ):
        raise ConfigError(
            f"attention_backend={asked.name} is not available on a CPU host, which has only "
            "CPU_ATTN: remove the option."
        )


def refuse_inert_options(vllm_config: VllmConfig) -> None:
    """Refuse options that only a token-by-token sampler reads."""
    model = vllm_config.model_config
    options = {
        "speculative_config": vllm_config.speculative_config,
        "logits_processors": model.logits_processors,
        "enable_prompt_embeds": model.enable_prompt_embeds,
        "return_sampling_mask": model.return_sampling_mask,
    }
    # vLLM loads installed logits processors unasked, but only its own sampler would call them.
    for plugin in entry_points(group=LOGITSPROCS_GROUP):
        options[f"the installed logits processor {plugin.name!r} ({plugin.value})"] = True
    if asked := [name for name, value in options.items() if value]:
        raise ConfigError(f"{', '.join(asked)} has no effect on a diffusion model: remove it.")
    if model.logprobs_mode not in {"raw_logprobs", "raw_logits"}:
        raise ConfigError(
            f"logprobs_mode={model.logprobs_mode} is not supported for a diffusion model: "
            "log-probabilities are those of the model's own distribution at temperature 1, since "
            "the processed one changes with every denoising step. Use raw_logprobs "
            "or raw_logits."
        )


def refuse_cut_canvases(scheduler: SchedulerConfig, canvas: int) -> None:
    """Refuse steps too small for a whole canvas, since canvases are never split."""
    for option in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
        rows = getattr(scheduler, option)
        if rows is not None and rows < canvas:
            raise ConfigError(
                f"{option} is {rows}, but a step must hold at least one canvas of {canvas} "
                f"tokens; raise it to {canvas} or more, or serve a narrower canvas with "
                "--diffusion-config."
            )
    if scheduler.long_prefill_token_threshold:
        # vLLM would clip canvases as if they were prompts.
        logger.warning(
            "long_prefill_token_threshold=%d would also clip canvases; "
            "it is disabled for diffusion models.",
            scheduler.long_prefill_token_threshold,
        )
        scheduler.long_prefill_token_threshold = 0


def refuse_head(form: HeadForm | None, inputs: int, ids: int, dtype: torch.dtype) -> None:
    """Refuse a format of the head's weights that this host cannot multiply with.

    Args:
        form: format of the copy, None for no copy.
        inputs: H.
        ids: V; ranks hold whole tiles of it.
        dtype: dtype of the model.
    """
    if form is None:
        return
    asked = f"{HEAD_WEIGHTS}={form} is not supported"
    if not current_platform.is_cpu():
        if form != "fp8":
            raise ConfigError(f"{asked} on a GPU, only on CPU hosts. Use fp8 or remove it.")
        # Requirements of torch's fp8 products with a scale per row.
        if not (current_platform.is_cuda() and current_platform.has_device_capability(_FP8)):
            raise ConfigError(
                f"{asked} on this GPU: its products need NVIDIA compute capability 8.9 or "
                "higher. Remove it."
            )
        if dtype != torch.bfloat16 or inputs % _FP8_GROUP or ids % _FP8_GROUP:
            raise ConfigError(
                f"{asked} for {ids} ids of {inputs} inputs in {dtype}: on a GPU both must be "
                f"multiples of {_FP8_GROUP} and the model must be in bfloat16. Remove it."
            )
    if form == "int8" and not int8.is_exact():
        raise ConfigError(f"{asked} on this processor, whose int8 sums overflow. Remove it.")
    if form == "nvfp4" and inputs % GROUP:
        raise ConfigError(f"{asked} for {inputs} inputs, which is not a multiple of {GROUP}.")


def refuse_head_of_masks(form: HeadForm | None, family: Family) -> None:
    """Refuse a format of the head's weights where no head that streams would read them."""
    if form is not None and family.mask_id is not None:
        raise ConfigError(
            f"{HEAD_WEIGHTS}={form} is not supported for {family.name}, whose logits are computed "
            "as a whole, since its mask token must be left out of them. Remove it."
        )


def refuse_unbuilt(family: Family) -> None:
    """A family that declares what the engine does not do yet, and would silently not do."""
    declared = {
        "reads": family.reads != 0,
        "seeded": family.seeded,
        "edits": family.edits,
        f"conditioning={family.conditioning}": family.conditioning is Conditioning.TIME,
    }
    if unbuilt := [name for name, is_declared in declared.items() if is_declared]:
        raise ConfigError(
            f"the family {family.name} declares {', '.join(unbuilt)}, which is not supported yet"
        )


def refuse_data_parallel_experts(vllm_config: VllmConfig) -> None:
    """Refuse several engines for a model with experts on a CPU host."""
    ranks = vllm_config.parallel_config.data_parallel_size
    if ranks > 1 and vllm_config.model_config.is_moe and current_platform.is_cpu():
        raise ConfigError(
            f"data_parallel_size is {ranks}, but with experts vLLM's engines exchange rows, which "
            "fails on a CPU host in the first step. Start as many servers instead."
        )
