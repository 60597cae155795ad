"""Set and check vLLM's configuration for diffusion models, before the engine starts.

vLLM calls the entry of its ``MODELS_CONFIG_MAP`` for the architecture while it builds the config,
in the process that the user started. A refusal is therefore an error on the command line, not in a
worker's log.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.config.scheduler import SchedulerConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_diffusion import __version__
from vllm_diffusion.config import Served, describe, head_memory, head_weights, served_rules
from vllm_diffusion.denoise.constants import KINDS
from vllm_diffusion.engine import carriers
from vllm_diffusion.engine.attention.gpu import FLASH_VERSION, needs_block_local
from vllm_diffusion.engine.fusion import SCHEDULER
from vllm_diffusion.engine.graphs import choose_capture_sizes
from vllm_diffusion.engine.lora.admission import check_host, check_options
from vllm_diffusion.engine.refusals import (
    refuse_attention_of_gpus,
    refuse_cut_canvases,
    refuse_data_parallel_experts,
    refuse_head,
    refuse_head_of_masks,
    refuse_inert_options,
    refuse_unbuilt,
)
from vllm_diffusion.engine.text_settings import settle_text
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.family import Text
from vllm_diffusion.head import cuda
from vllm_diffusion.models import family_module
from vllm_diffusion.request.options import PREFIX
from vllm_diffusion.trace.record import trace_folder
from vllm_diffusion.upstream import ledger

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_diffusion.denoise.constants import ServedRules
    from vllm_diffusion.family import Family, FamilyModule

logger = logging.getLogger(f"vllm.{__name__}")

_BLACKWELL = 100  # the sm_100 family, without sm_120


class CanvasServing(VerifyAndUpdateConfig):
    """vLLM's own settings for the architecture, then those that our engine needs."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Set what serving canvases needs, and refuse settings that prevent it.

        Raises:
            ConfigError: a setting that would change or break the output, invalid options of ours, a
                trace folder that cannot be written to, a version of the head that is not built, or
                a format of its weights that this host cannot multiply with.
            CheckpointError: the checkpoint lacks the constants of its decoding rule.
        """
        scheduler = vllm_config.scheduler_config
        asked_seqs = scheduler.max_num_seqs
        module = family_module(vllm_config.model_config.architecture)
        refuse_attention_of_gpus(vllm_config)
        serve_text_alone_without_processor(vllm_config.model_config)
        settle_backbone(vllm_config, module)
        canvas = settle_canvas(vllm_config)
        ledger.apply_stage(ledger.Stage.SERVING)
        refuse_inert_options(vllm_config)
        refuse_data_parallel_experts(vllm_config)
        check_options(vllm_config.lora_config)
        warn_unread_overrides(vllm_config.model_config)
        served, origins = publish(vllm_config, module, canvas)
        canvas = served.canvas_length
        settle_text(vllm_config, served.family)
        check_host(vllm_config)
        refuse_cut_canvases(scheduler, canvas)
        settle_scheduler(vllm_config, canvas, asked_seqs)
        if served.family.horizon:
            # vLLM's number is that of all rows behind the text.
            rows = max(canvas, vllm_config.model_config.max_model_len)
            vllm_config.diffusion_config.canvas_length = rows
        logger.info(
            "vllm-diffusion %s serves %s: canvas of %d, at most %d at once, %s; logits of a step "
            "take at most %d MB; patches %s; "
            "VLLM_DIFFUSION=0 turns it off",
            __version__,
            vllm_config.model_config.architecture,
            canvas,
            scheduler.max_num_seqs,
            describe(served.rules.default, origins),
            served.head_memory_mb,
            ", ".join(ledger.active()),
        )


def settle_backbone(vllm_config: VllmConfig, module: FamilyModule) -> None:
    """Apply vLLM's settings for the family's backbone, and choose an attention backend."""
    attention = vllm_config.attention_config
    asked = attention.backend or attention.flash_attn_version
    module.settle(vllm_config)
    if asked is None:
        choose_attention_of_ranges(vllm_config)


def settle_canvas(vllm_config: VllmConfig) -> int:
    """Set the canvas width: the user's, else the checkpoint's."""
    diffusion = vllm_config.diffusion_config
    if carriers.is_served(vllm_config.model_config.hf_config):
        return carriers.served(vllm_config.model_config.hf_config).canvas_length
    if diffusion.canvas_length is None:
        # vLLM takes the checkpoint's width only if there is no --diffusion-config at all.
        diffusion.canvas_length = vllm_config.model_config.hf_config.canvas_length
    return int(diffusion.canvas_length)


def publish(
    vllm_config: VllmConfig, module: FamilyModule, canvas: int
) -> tuple[Served, dict[str, str]]:
    """Store what is served where every process of the engine finds it.

    Returns:
        It, and the origins of the default rule's constants, see ``config.served_rules``.
    """
    model = vllm_config.model_config
    generation, ours = model.try_get_generation_config(), ours_of(vllm_config)
    family = of_width(module.declare(model.hf_config, generation), canvas)
    refuse_unbuilt(family)
    rules, origins = rules_of(vllm_config, family)
    if (folder := trace_folder(os.environ)) is not None:
        logger.info("Every request is recorded in %s.", folder)
    if cuda.chosen():
        logger.info("The head runs in CUDA on GPUs, not in Triton.")
    form = head_weights(ours)
    refuse_head_of_masks(form, family)
    refuse_head(form, model.hf_text_config.hidden_size, model.get_vocab_size(), model.dtype)
    served = Served(
        canvas_length=canvas,
        family=family,
        rules=rules,
        head_memory_mb=head_memory(ours),
        head_weights=form,
    )
    carriers.put_served(model.hf_config, served)
    return served, origins


def of_width(family: Family, canvas: int) -> Family:
    """The family with blocks of the canvas's width, where a checkpoint leaves that open.

    Raises:
        ConfigError: the model was trained on another width.
    """
    if family.text is Text.BLOCK and canvas != family.block:
        raise ConfigError(
            f"--diffusion-config asks for a canvas_length of {canvas}, but this checkpoint's "
            f"canvases are the blocks of {family.block} tokens that it was trained on: remove it."
        )
    if family.text is not Text.WHOLE or canvas == family.block:
        return family
    # As many steps as tokens, which is how such a rule is published.
    return replace(family, block=canvas, published={**family.published, "max_steps": canvas})


def rules_of(vllm_config: VllmConfig, family: Family) -> tuple[ServedRules, dict[str, str]]:
    """The engine's decoding rules and their origins, see ``config.served_rules``."""
    model = vllm_config.model_config
    return served_rules(
        model.try_get_generation_config(),
        source=f"generation config {model.generation_config!r} of {model.model}",
        override=model.override_generation_config,
        max_denoising_steps=vllm_config.diffusion_config.max_denoising_steps,
        additional=ours_of(vllm_config),
        kind=KINDS[family.rule],
        published=family.published,
    )


def ours_of(vllm_config: VllmConfig) -> object:
    """``additional_config["diffusion"]``; a platform may replace ``additional_config``."""
    additional = vllm_config.additional_config
    return additional.get("diffusion") if isinstance(additional, dict) else None


def settle_scheduler(vllm_config: VllmConfig, canvas: int, asked_seqs: int) -> None:
    """Set our scheduler, ``max_num_seqs`` by the canvases that fit in a step, and graph sizes.

    Args:
        vllm_config: the engine's config.
        canvas: canvas width.
        asked_seqs: ``max_num_seqs`` before vLLM's own settings changed it.
    """
    scheduler = vllm_config.scheduler_config
    # vLLM's own default never exceeds the token budget.
    default_seqs = SchedulerConfig.DEFAULT_MAX_NUM_SEQS
    if asked_seqs >= min(default_seqs, scheduler.max_num_batched_tokens):
        # vLLM falls back to 8 here because its sampler holds all logits at once; ours does not.
        # More canvases than the token budget holds would only wait with their KV allocated.
        fitting = max(1, scheduler.max_num_batched_tokens // canvas)
        scheduler.max_num_seqs = min(asked_seqs, fitting)
    choose_capture_sizes(vllm_config)
    if scheduler.scheduler_cls is None:
        scheduler.scheduler_cls = SCHEDULER
    elif scheduler.scheduler_cls != SCHEDULER:
        logger.warning(
            "scheduler_cls=%s is kept; unless it derives from %s.WholeCanvasMixin, canvases "
            "are clipped at the token budget or max_model_len. Commits are not fused.",
            scheduler.scheduler_cls,
            SCHEDULER.rpartition(".")[0],
        )
    if vllm_config.model_config.is_mm_prefix_lm:
        # An image attends to itself bidirectionally, so all of it must run in one step.
        scheduler.disable_chunked_mm_input = True


def serve_text_alone_without_processor(model: ModelConfig) -> None:
    """Serve only text if the checkpoint lacks its processor's files, as a fine-tune may.

    vLLM itself would log a failing warm-up and answer every request with an image by status 500.
    """
    multimodal = model.multimodal_config
    if multimodal is None or model.skip_tokenizer_init or not model.supports_multimodal_inputs:
        return
    try:
        # Cached for later use in this process.
        MULTIMODAL_REGISTRY.get_processing_info(model).get_hf_processor()
    except OSError as error:
        multimodal.language_model_only = True
        logger.warning(
            "%s serves only text, and requests with images or video are refused: its "
            "processor cannot be loaded (%s)",
            model.model,
            str(error).partition("\n")[0],
        )


def warn_unread_overrides(model: ModelConfig) -> None:
    """Published command lines set the rule in ``--hf-overrides``, which no server reads."""
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else {}
    if unread := [name for name in overrides if name.startswith(PREFIX)]:
        logger.warning(
            "%s in --hf-overrides does not change the decoding rule, which is logged below. "
            "Set its constants by name, as in --additional-config "
            """'{"diffusion": {"entropy_bound": 0.3}}'.""",
            ", ".join(unread),
        )


def choose_attention_of_ranges(vllm_config: VllmConfig) -> None:
    """Choose TRITON_ATTN where vLLM's choice cannot mask the prefix of a canvas by ranges.

    On sm_100 FlashAttention 4 has a separate kernel for heads of 256, and on sm_90 with an FP8
    cache version 3 serves the sliding layers: neither takes ranges. vLLM itself looks for a backend
    that does only if images are served.
    """
    model, attention = vllm_config.model_config, vllm_config.attention_config
    window = model.get_sliding_window()
    if current_platform.is_cpu() or not needs_block_local(model.max_model_len, window):
        return
    flash = attention.backend in {None, AttentionBackendEnum.FLASH_ATTN}
    of_ranges = attention.flash_attn_version == FLASH_VERSION
    if flash and (not of_ranges or current_platform.is_device_capability_family(_BLACKWELL)):
        attention.backend = AttentionBackendEnum.TRITON_ATTN
