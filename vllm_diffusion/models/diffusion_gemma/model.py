"""DiffusionGemma for vLLM: Gemma 4's backbone and vision tower, and self-conditioning.

One forward serves both modes. Which rows are prompt or commit rows (causal, write final KV) and
which are canvas rows (bidirectional, scratch KV) is data: attention metadata and ``canvas_rows``,
both set by the model state before every forward.
"""
# ruff: noqa: SLF001 - Gemma 4's image path is borrowed method by method, see the class.

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.gemma4 import Gemma4Model
from vllm.model_executor.models.gemma4_mm import (
    Gemma4DummyInputsBuilder,
    Gemma4ForConditionalGeneration,
    Gemma4MultimodalEmbedder,
    Gemma4MultiModalProcessor,
)
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsQuant
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.transformers.utils import recursive_replace_linear
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_diffusion.engine.packed_layers.configuration import adopt, is_released
from vllm_diffusion.engine.packed_layers.layers import describe
from vllm_diffusion.models.decoder.reload import pack_experts_again
from vllm_diffusion.models.decoder.vocabulary import rank_vocabulary
from vllm_diffusion.models.decoder.weights import PACKED_MODULES, readable, refuse_missing
from vllm_diffusion.models.diffusion_gemma.adapter_form import FORM
from vllm_diffusion.models.diffusion_gemma.layers import CanvasDecoderLayer, SelfConditioning
from vllm_diffusion.models.diffusion_gemma.processing import (
    DiffusionGemmaProcessingInfo,
    tower_config,
)
from vllm_diffusion.models.diffusion_gemma.weights import (
    MAPPER,
    VESTIGIAL_PREFIXES,
    unquantised,
    whole,
)
from vllm_diffusion.upstream import ledger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig
    from vllm.model_executor.layers.quantization import QuantizationConfig

    from vllm_diffusion.engine.lora.slots import CanvasAdapters
    from vllm_diffusion.head.vocabulary import Vocabulary

logger = init_logger(f"vllm.{__name__}")

# Vision towers whose widths are no multiple of this stay unquantised: group-wise schemes need it.
_QUANTISABLE_MULTIPLE = 64


@MULTIMODAL_REGISTRY.register_processor(
    Gemma4MultiModalProcessor,
    info=DiffusionGemmaProcessingInfo,
    dummy_inputs=Gemma4DummyInputsBuilder,
)
class DiffusionGemmaForBlockDiffusion(nn.Module, SupportsLoRA, SupportsMultiModal, SupportsQuant):
    """The model class vLLM loads for ``DiffusionGemmaForBlockDiffusion`` checkpoints.

    Interface flags must stand in this module: vLLM caches what it learns about a class by a hash of
    this one file.
    """

    hf_to_vllm_mapper = MAPPER
    packed_modules_mapping = PACKED_MODULES

    # Gemma 4's image path, unchanged: parsing, the tower, the projection into the embedding space.
    _parse_and_validate_image_input = Gemma4ForConditionalGeneration._parse_and_validate_image_input
    _parse_and_validate_video_input = Gemma4ForConditionalGeneration._parse_and_validate_video_input
    _parse_and_validate_multimodal_inputs = (
        Gemma4ForConditionalGeneration._parse_and_validate_multimodal_inputs
    )
    _encoder_chunk = staticmethod(Gemma4ForConditionalGeneration._encoder_chunk)
    if hasattr(Gemma4ForConditionalGeneration, "_get_max_soft_tokens"):  # from vLLM 0.33 on
        _get_max_soft_tokens = Gemma4ForConditionalGeneration._get_max_soft_tokens
    _process_image_input = Gemma4ForConditionalGeneration._process_image_input
    _process_video_input = Gemma4ForConditionalGeneration._process_video_input
    embed_multimodal = Gemma4ForConditionalGeneration.embed_multimodal

    @staticmethod
    def get_model_state_cls() -> type:
        """The ModelState that denoises instead of decoding token by token."""
        from vllm_diffusion.engine.model_state import CanvasModelState

        return CanvasModelState

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The text a chat message's image or video stands as; ``i`` is its number, unused."""
        del i
        # What Gemma 4's processor looks for, and puts the soft tokens in the place of.
        placeholders = {"image": "<|image|>", "video": "<|video|>"}
        if modality not in placeholders:
            raise ValueError(f"DiffusionGemma reads images and video, got {modality!r}")
        return placeholders[modality]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        from vllm_diffusion.engine.attention.segments import use_canvas_attention

        config = vllm_config.model_config.hf_config
        text_config = vllm_config.model_config.hf_text_config
        quant_config = vllm_config.quant_config
        # Before the first layer is built, since a layer asks it how to store its weights.
        adopt(quant_config)
        self.config = config
        self.quant_config = quant_config
        self.released_quantisation: bool = is_released(quant_config)
        # Where ranks read their experts alone, nobody sees them all.
        filtered = vllm_config.parallel_config.enable_ep_weight_filter
        self.expected_experts: int | None = None if filtered else text_config.num_experts
        self.expected_modules: tuple[str, ...] = tuple(FORM.matrices(text_config))
        self.source: str = vllm_config.model_config.model
        self.loads: int = 0
        self.model_dtype = vllm_config.model_config.dtype
        # Full-attention layers have no v_proj: the loader must put k_proj into both shards. The
        # flag has to stand before the backbone is built; the config class does not carry it.
        text_config.attention_k_eq_v = True
        # Before the first attention layer is built, since a layer picks its backend then.
        use_canvas_attention()
        if vllm_config.lora_config is not None:
            # Before the first experts are built, since they pick their kernel then.
            ledger.apply_stage(ledger.Stage.ADAPTERS)

        self._build_vision(vllm_config, prefix)
        self.model = Gemma4Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.canvas_rows = torch.zeros(
            vllm_config.scheduler_config.max_num_batched_tokens, 1, dtype=torch.bool
        )
        for layer in self.model.layers:
            CanvasDecoderLayer.adopt(layer, self.canvas_rows)
            # Ranges widen the window instead of being clipped by it, as in the reference.
            layer.self_attn.attn.mm_prefix_clamp_sliding_window = False

        self.lm_head = ParallelLMHead(
            text_config.vocab_size,
            text_config.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if text_config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.softcap: float | None = text_config.final_logit_softcapping
        # The softcap is applied in fp32 in `logits`, so this only multiplies and gathers.
        self.logits_processor = LogitsProcessor(text_config.vocab_size, soft_cap=None)
        self.self_conditioning = SelfConditioning(
            text_config.hidden_size,
            text_config.intermediate_size,
            eps=text_config.rms_norm_eps,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "self_conditioning"),
        )
        # Set where LoRA is on, once the weights are loaded.
        self.adapters: CanvasAdapters | None = None
        # True while the next call of compute_logits is the sampler's, see there.
        self.sampler_takes_hidden: bool = False

    def _build_vision(self, vllm_config: VllmConfig, prefix: str) -> None:
        """Gemma 4's vision tower and the projection into the text embedding space."""
        self._enable_mm_lora = False  # read by the borrowed image path
        config = tower_config(vllm_config.model_config)
        if config is None:
            self.vision_tower = None
            self.embed_vision = None
            return
        quant = self._tower_quantisation(vllm_config.quant_config, config)
        with self._mark_tower_model(vllm_config, {"image", "video"}):  # type: ignore[operator]
            self.vision_tower = AutoModel.from_config(config=config)
            self.embed_vision = Gemma4MultimodalEmbedder(
                config,
                vllm_config.model_config.hf_text_config,
                quant_config=quant,
                prefix=maybe_prefix(prefix, "embed_vision"),
            )
            recursive_replace_linear(
                self.vision_tower, quant, prefix=maybe_prefix(prefix, "vision_tower")
            )

    @staticmethod
    def _tower_quantisation(
        quant_config: QuantizationConfig | None,
        vision_config: Any,
    ) -> QuantizationConfig | None:
        """The tower's quantisation: schemes that name their targets decide, others by its width."""
        if quant_config is None:
            return None
        if quant_config.get_name() in ("bitsandbytes", "torchao", "compressed-tensors"):
            return quant_config
        sizes = (vision_config.hidden_size, vision_config.intermediate_size)
        return quant_config if all(s % _QUANTISABLE_MULTIPLE == 0 for s in sizes) else None

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are language, connector and tower."""
        return MultiModelKeys.from_string_field(
            language_model="model", connector=["embed_vision"], tower_model=["vision_tower"]
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Final hidden states [N, H] of prompt, commit and canvas rows alike."""
        return self.model(
            input_ids=input_ids,
            positions=positions,
            intermediate_tensors=intermediate_tensors,
            inputs_embeds=None if intermediate_tensors is not None else inputs_embeds,
            **kwargs,
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of hidden rows, or the rows themselves when the sampler asked for those.

        The runner calls this between forward and sampler with every canvas row at once. A head must
        not have all their logits at once, so the model state sets ``sampler_takes_hidden`` before
        the forward and the sampler clears it. Other callers (prompt logprobs) get logits.
        """
        return hidden_states if self.sampler_takes_hidden else self.logits(hidden_states)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[R, H] -> [R, vocab] fp32, softcap applied in fp32 as the reference does."""
        logits = self.logits_processor(self.lm_head, hidden_states).float()
        if self.softcap is None:
            return logits
        # In place: these are the largest tensors of a step, and nobody else holds them.
        return logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def embed_text(self, input_ids: Tensor, out: Tensor) -> None:
        """Write the embeddings of [N] tokens, scaled, into [N, H] model dtype."""
        torch.mul(self.model.embed_tokens(input_ids), self.model.normalizer, out=out)

    def soft_embedding(self, probabilities: Tensor) -> Tensor:
        """[R, vocab] fp32 -> [R, H]: the expected embedding, scaled like a token's.

        The embedding is sharded over the vocabulary; every rank adds its part.
        """
        table = self.model.embed_tokens
        start, end = (
            table.shard_indices.org_vocab_start_index,
            table.shard_indices.org_vocab_end_index,
        )
        weight = table.weight[: end - start]
        soft = probabilities[:, start:end].to(weight.dtype) @ weight
        return tensor_model_parallel_all_reduce(soft) * self.model.normalizer

    def vocabulary(self) -> Vocabulary | None:
        """This rank's part of the vocabulary for a head that streams over it.

        None where the head cannot be read as a plain matrix, see ``rank_vocabulary``.
        """
        return rank_vocabulary(
            self.lm_head,
            self.model.embed_tokens,
            self.logits_processor,
            softcap=self.softcap,
            scale=self.model.normalizer,
            loads=lambda: self.loads,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the released names; a file that holds one layer scalar serves both kinds of row.

        Raises:
            CheckpointError: a file cannot be read, a weight is in none of them, or one is quantised
                that is served plain.
        """
        if self.loads:
            pack_experts_again(self)
        loader = AutoWeightsLoader(self, ignore_unexpected_prefixes=VESTIGIAL_PREFIXES)
        head = {f"lm_head.{name}" for name, _ in self.lm_head.named_parameters()}
        weights = unquantised(readable(weights, self.source), self.source, known=head)
        # Scales of other quantised files depend on their scheme; an update may bring a part.
        known = self.quant_config is None or self.released_quantisation
        if known and not self.loads:
            weights = whole(
                weights, self.source, modules=self.expected_modules, experts=self.expected_experts
            )
        loaded: set[str] = loader.load_weights(weights, mapper=self.hf_to_vllm_mapper)
        for index, layer in enumerate(self.model.layers):
            names = [f"model.layers.{index}.{kind}_layer_scalar" for kind in ("encoder", "decoder")]
            encoder, decoder = (name in loaded for name in names)
            if encoder and not decoder:
                layer.decoder_layer_scalar.copy_(layer.encoder_layer_scalar)
            elif decoder and not encoder:
                layer.encoder_layer_scalar.copy_(layer.decoder_layer_scalar)
            if encoder or decoder:
                loaded.update(names)
        if known and not self.loads:
            refuse_missing(self, loaded, self.source)
        self.loads += 1
        return loaded

    def process_weights_after_loading(self) -> None:
        """Say what quantised weights take on a CPU; called when every layer has done its part."""
        if line := describe(self, self.model_dtype):
            logger.info(line)
