"""What serving a canvas asks of vLLM's configuration, decided before the engine starts.

vLLM calls the entry of its ``MODELS_CONFIG_MAP`` for the architecture while it builds the config,
in the process the user started: a refusal is an error at the prompt, not in a worker's log.
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import torch
from vllm.config.scheduler import SchedulerConfig
from vllm.model_executor.models.config import DiffusionGemmaModelForBlockDiffusionConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from vllm_diffusion import __version__
from vllm_diffusion.config import HEAD_WEIGHTS, describe, head_memory, head_weights, served_rules
from vllm_diffusion.engine.attention.gpu import FLASH_VERSION, needs_block_local
from vllm_diffusion.engine.fusion import SCHEDULER
from vllm_diffusion.engine.graphs import choose_capture_sizes
from vllm_diffusion.engine.lora.admission import check_host, check_options
from vllm_diffusion.errors import ConfigError
from vllm_diffusion.head import cuda
from vllm_diffusion.params import PREFIX
from vllm_diffusion.quant import int8
from vllm_diffusion.quant.packed import GROUP
from vllm_diffusion.trace.record import trace_folder
from vllm_diffusion.upstream import ledger

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from vllm_diffusion.denoise.constants import ServedRules
    from vllm_diffusion.head.output_copy import HeadForm

logger = logging.getLogger(f"vllm.{__name__}")

_BLACKWELL = 100  # sm_100 and its kin; sm_120 is none of them
_FP8 = 89  # the least compute capability of torch's products of fp8
_FP8_GROUP = 16  # ids and inputs of theirs


def rules_of(vllm_config: VllmConfig) -> tuple[ServedRules, dict[str, str]]:
    """The decoding rules of this engine and who changed them, see ``config.served_rules``."""
    model_config = vllm_config.model_config
    return served_rules(
        model_config.try_get_generation_config(),
        source=f"generation config {model_config.generation_config!r} of {model_config.model}",
        override=model_config.override_generation_config,
        max_denoising_steps=vllm_config.diffusion_config.max_denoising_steps,
        additional=_ours(vllm_config),
    )


def _ours(vllm_config: VllmConfig) -> object:
    """``additional_config["diffusion"]``; another platform may put an object of its own there."""
    additional = vllm_config.additional_config
    return additional.get("diffusion") if isinstance(additional, dict) else None


class DiffusionGemmaServing(DiffusionGemmaModelForBlockDiffusionConfig):
    """vLLM's own settings for the architecture, then what our engine needs on top."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Set or refuse what a canvas cannot be served with.

        Raises:
            ConfigError: a setting that would change or break the output, options of ours that make
                no sense, a folder for traces that cannot be written to, a form of the head that
                is not built, or one of its weights that this host has no products for.
            CheckpointError: the checkpoint lacks the constants of its decoding rule.
        """
        scheduler, attention = vllm_config.scheduler_config, vllm_config.attention_config
        asked_seqs = scheduler.max_num_seqs
        asked_attention = attention.backend or attention.flash_attn_version
        cls._attention_this_host_has(vllm_config)
        cls._text_alone_without_processor(vllm_config.model_config)
        super().verify_and_update_config(vllm_config)
        if asked_attention is None:
            cls._attention_of_ranges(vllm_config)
        diffusion = vllm_config.diffusion_config
        if diffusion.canvas_length is None:
            # vLLM takes the checkpoint's width only where there is no --diffusion-config at all.
            diffusion.canvas_length = vllm_config.model_config.hf_config.canvas_length
        canvas = diffusion.canvas_length
        # Requests are checked where only the model's config is at hand: one width and the rules
        # for all. Rules as a dict, since a config is written as JSON.
        vllm_config.model_config.hf_config.canvas_length = canvas

        ledger.apply_stage(ledger.Stage.SERVING)
        cls._nothing_inert(vllm_config)
        if vllm_config.parallel_config.data_parallel_size > 1 and current_platform.is_cpu():
            raise ConfigError(
                "data_parallel_size is "
                f"{vllm_config.parallel_config.data_parallel_size}, but vLLM's engines exchange "
                "the rows of experts, which on a CPU host they cannot: the first step would end "
                "them. Start as many servers instead."
            )
        check_options(vllm_config.lora_config)
        check_host(vllm_config)
        cls._tell_unread_overrides(vllm_config.model_config)
        rules, origins = rules_of(vllm_config)
        if (folder := trace_folder(os.environ)) is not None:
            logger.info("Every request is recorded in %s.", folder)
        if cuda.chosen():
            logger.info("The head runs in CUDA on GPUs, not in Triton.")
        vllm_config.model_config.hf_config.denoising_rules = rules.to_dict()
        generation = vllm_config.model_config.try_get_generation_config()
        vllm_config.model_config.hf_config.end_token_ids = generation.get("eos_token_id")
        memory = head_memory(_ours(vllm_config))
        vllm_config.model_config.hf_config.head_memory_mb = memory
        form = head_weights(_ours(vllm_config))
        model = vllm_config.model_config
        cls._head_can_be(
            form, model.hf_text_config.hidden_size, model.get_vocab_size(), model.dtype
        )
        vllm_config.model_config.hf_config.head_weights = form
        cls._whole_canvases(scheduler, canvas)
        # vLLM's own default is never above the token budget.
        default_seqs = SchedulerConfig.DEFAULT_MAX_NUM_SEQS
        if asked_seqs >= min(default_seqs, scheduler.max_num_batched_tokens):
            # vLLM falls back to 8 here because its sampler holds all logits at once. Ours does not;
            # more canvases than the token budget holds would only wait with their KV allocated.
            fitting = max(1, scheduler.max_num_batched_tokens // canvas)
            scheduler.max_num_seqs = min(asked_seqs, fitting)
        choose_capture_sizes(vllm_config)
        if scheduler.scheduler_cls is None:
            scheduler.scheduler_cls = SCHEDULER
        elif scheduler.scheduler_cls != SCHEDULER:
            logger.warning(
                "scheduler_cls=%s is kept; unless it derives from %s.WholeCanvasMixin, canvases "
                "are cut where the token budget or max_model_len ends. Commits are not fused.",
                scheduler.scheduler_cls,
                SCHEDULER.rpartition(".")[0],
            )
        if vllm_config.model_config.is_mm_prefix_lm:
            # An image attends to itself in both directions, so all of it must run in one step.
            scheduler.disable_chunked_mm_input = True
        logger.info(
            "vllm-diffusion %s serves %s: canvas of %d, at most %d at once, %s; logits of a step "
            "take at most %d MB; patches %s; "
            "VLLM_DIFFUSION=0 turns it off",
            __version__,
            vllm_config.model_config.architecture,
            canvas,
            scheduler.max_num_seqs,
            describe(rules.default, origins),
            memory,
            ", ".join(ledger.active()),
        )

    @staticmethod
    def _text_alone_without_processor(model: ModelConfig) -> None:
        """A checkpoint without its processor's files, as a fine-tune may be, still serves text.

        vLLM would say that a warm-up failed, and end every request with an image by status 500.
        """
        multimodal = model.multimodal_config
        if multimodal is None or model.skip_tokenizer_init or not model.supports_multimodal_inputs:
            return
        try:
            # Kept, for whoever needs it later in this process.
            MULTIMODAL_REGISTRY.get_processing_info(model).get_hf_processor()
        except OSError as error:
            multimodal.language_model_only = True
            logger.warning(
                "%s serves text alone, and requests with images or video are refused: its "
                "processor cannot be loaded (%s)",
                model.model,
                str(error).partition("\n")[0],
            )

    @staticmethod
    def _tell_unread_overrides(model: ModelConfig) -> None:
        """Published command lines set the rule in ``--hf-overrides``, which no server reads."""
        overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else {}
        if unread := [name for name in overrides if name.startswith(PREFIX)]:
            logger.warning(
                "%s in --hf-overrides changes no decoding rule: the one that is served follows. "
                "Set its constants by name, as in --additional-config "
                """'{"diffusion": {"entropy_bound": 0.3}}'.""",
                ", ".join(unread),
            )

    @staticmethod
    def _attention_this_host_has(vllm_config: VllmConfig) -> None:
        """A backend that is asked for on a CPU host and not there is refused: vLLM only logs it."""
        asked = vllm_config.attention_config.backend
        if (
            current_platform.is_cpu()
            and asked not in {None, AttentionBackendEnum.CPU_ATTN}
            # vLLM's settings for Gemma name one themselves, when this config was made first.
            and not hasattr(vllm_config.model_config.hf_config, "denoising_rules")
        ):
            raise ConfigError(
                f"attention_backend={asked.name} is not for a CPU host, which has CPU_ATTN alone: "
                "leave the option out."
            )

    @staticmethod
    def _attention_of_ranges(vllm_config: VllmConfig) -> None:
        """TRITON_ATTN where the backend that vLLM would take cannot show a canvas its prefix.

        On sm_100 FlashAttention 4 has a kernel of its own for heads of 256, and on sm_90 with an
        FP8 cache version 3 reads the sliding layers: neither takes ranges. vLLM looks for a backend
        that does only where images are served.
        """
        model, attention = vllm_config.model_config, vllm_config.attention_config
        if current_platform.is_cpu() or not needs_block_local(
            model.max_model_len, model.hf_text_config.sliding_window
        ):
            return
        flash = attention.backend in {None, AttentionBackendEnum.FLASH_ATTN}
        of_ranges = attention.flash_attn_version == FLASH_VERSION
        if flash and (not of_ranges or current_platform.is_device_capability_family(_BLACKWELL)):
            attention.backend = AttentionBackendEnum.TRITON_ATTN

    @staticmethod
    def _head_can_be(form: HeadForm | None, inputs: int, ids: int, dtype: torch.dtype) -> None:
        """A form of the head's weights that this host has no products for is refused.

        Args:
            form: of the copy, None where there is none.
            inputs: H.
            ids: V; ranks hold whole tiles of it.
            dtype: of the model.
        """
        if form is None:
            return
        asked = f"{HEAD_WEIGHTS}={form} is not supported"
        if not current_platform.is_cpu():
            if form != "fp8":
                raise ConfigError(f"{asked} on a GPU, only on CPU hosts. Use fp8 or remove it.")
            # What torch's products of fp8 with a scale for every row take.
            if not (current_platform.is_cuda() and current_platform.has_device_capability(_FP8)):
                raise ConfigError(
                    f"{asked} on this GPU: its products take NVIDIA's compute capability 8.9 or "
                    "higher. Remove it."
                )
            if dtype != torch.bfloat16 or inputs % _FP8_GROUP or ids % _FP8_GROUP:
                raise ConfigError(
                    f"{asked} for {ids} ids of {inputs} inputs in {dtype}: on a GPU both are "
                    f"multiples of {_FP8_GROUP} and the model is in bfloat16. Remove it."
                )
        if form == "int8" and not int8.is_exact():
            raise ConfigError(f"{asked} on this processor, whose int8 sums overflow. Remove it.")
        if form == "nvfp4" and inputs % GROUP:
            raise ConfigError(f"{asked} for {inputs} inputs, which are no groups of {GROUP}.")

    @staticmethod
    def _nothing_inert(vllm_config: VllmConfig) -> None:
        """An option that a token-by-token sampler reads and ours does not is refused."""
        model = vllm_config.model_config
        options = {
            "speculative_config": vllm_config.speculative_config,
            "logits_processors": model.logits_processors,
            "enable_prompt_embeds": model.enable_prompt_embeds,
            "return_sampling_mask": model.return_sampling_mask,
        }
        # vLLM loads these without being asked, and its own sampler alone would call them.
        for plugin in entry_points(group=LOGITSPROCS_GROUP):
            options[f"the installed logits processor {plugin.name!r} ({plugin.value})"] = True
        if asked := [name for name, value in options.items() if value]:
            raise ConfigError(f"{', '.join(asked)} does nothing for a diffusion model: remove it.")
        if model.logprobs_mode not in {"raw_logprobs", "raw_logits"}:
            raise ConfigError(
                f"logprobs_mode={model.logprobs_mode} is not supported for a diffusion model: a "
                "canvas is committed by the model's own distribution at temperature 1, and what "
                "the schedule and a request made of it changes with every step. Use raw_logprobs "
                "or raw_logits."
            )

    @staticmethod
    def _whole_canvases(scheduler: SchedulerConfig, canvas: int) -> None:
        """A canvas runs in one piece or not at all."""
        for option in ("max_num_batched_tokens", "max_num_scheduled_tokens"):
            rows = getattr(scheduler, option)
            if rows is not None and rows < canvas:
                raise ConfigError(
                    f"{option} is {rows}, but a step must hold at least one canvas of {canvas} "
                    f"tokens; raise it to {canvas} or more, or serve a narrower canvas with "
                    "--diffusion-config."
                )
        if scheduler.long_prefill_token_threshold:
            # It would clip canvases as if they were prompts.
            logger.warning(
                "long_prefill_token_threshold=%d would also cut canvases short; "
                "it is switched off for diffusion models.",
                scheduler.long_prefill_token_threshold,
            )
            scheduler.long_prefill_token_threshold = 0
