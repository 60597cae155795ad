"""A plain decoder of vLLM that denoises canvases: everything but the backbone itself.

Which rows see which is attention metadata, set by the model state before every forward, so one
forward serves prompt, commit and canvas rows alike, and the backbone is vLLM's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from vllm_diffusion.engine.packed_layers.configuration import adopt, is_released
from vllm_diffusion.engine.packed_layers.layers import describe
from vllm_diffusion.models.decoder.reload import pack_experts_again
from vllm_diffusion.models.decoder.vocabulary import rank_vocabulary
from vllm_diffusion.models.decoder.weights import PACKED_MODULES, complete, readable, refuse_missing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.config import VllmConfig

    from vllm_diffusion.head.vocabulary import Vocabulary

logger = init_logger(f"vllm.{__name__}")

NO_RENAMES: Final = WeightsMapper()


class CanvasDecoder(nn.Module):
    """What ``family.CanvasModel`` and vLLM ask for, around a backbone.

    A family's model class names the backbone and adds vLLM's interface flags, which must stand in
    its own module: vLLM caches what it learns about a class by a hash of that one file.
    """

    backbone: ClassVar[type[nn.Module]]
    """vLLM's model without a head; gives final hidden states."""
    renames: ClassVar[WeightsMapper] = NO_RENAMES
    """From the checkpoint's names to the backbone's, before it stacks any."""
    packed_modules_mapping = PACKED_MODULES

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        from vllm_diffusion.engine.attention.segments import use_canvas_attention

        config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        # Before the first layer is built, since a layer asks it how to store its weights.
        adopt(quant_config)
        # Before the first attention layer is built, since a layer picks its backend then.
        use_canvas_attention()
        self.config = config
        self.quant_config = quant_config
        self.released_quantisation: bool = is_released(quant_config)
        self.model_dtype = vllm_config.model_config.dtype
        self.source: str = vllm_config.model_config.model
        self.loads: int = 0
        # Where ranks read their experts alone, nobody sees them all.
        filtered = vllm_config.parallel_config.enable_ep_weight_filter
        self.expected_experts: int = 0 if filtered else vllm_config.model_config.get_num_experts()
        self.model: Any = self.backbone(
            vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model")
        )
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # True while the next call of compute_logits is the sampler's, see there.
        self.sampler_takes_hidden: bool = False

    @staticmethod
    def get_model_state_cls() -> type:
        """The ModelState that denoises instead of decoding token by token."""
        from vllm_diffusion.engine.model_state import CanvasModelState

        return CanvasModelState

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[N] tokens -> [N, H]."""
        embedded: Tensor = self.model.embed_input_ids(input_ids)
        return embedded

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [N, H] of prompt, commit and canvas rows alike."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits of hidden rows, or the rows themselves when the sampler asked for those.

        The runner calls this between forward and sampler with every canvas row at once. A head must
        not have all their logits at once, so the model state sets ``sampler_takes_hidden`` before
        the forward and the sampler clears it. Other callers get logits.
        """
        return hidden_states if self.sampler_takes_hidden else self.logits(hidden_states)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[R, H] -> [R, vocab] fp32."""
        return self.logits_processor(self.lm_head, hidden_states).float()

    def vocabulary(self) -> Vocabulary | None:
        """This rank's part of the vocabulary for a head that streams over it, or None."""
        return rank_vocabulary(
            self.lm_head,
            self.model.embed_tokens,
            self.logits_processor,
            loads=lambda: self.loads,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the released names.

        Raises:
            CheckpointError: a file cannot be read, or a weight is in none of them.
        """
        if self.loads:
            pack_experts_again(self)
        weights = self.renames.apply(readable(weights, self.source))
        if not self.loads and self.quant_config is None:
            weights = complete(weights, self, self.source, experts=self.expected_experts)
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights)
        # Scales of other quantised files depend on their scheme; an update may bring a part.
        known = self.quant_config is None or self.released_quantisation
        if known and not self.loads:
            refuse_missing(self, loaded, self.source)
        self.loads += 1
        return loaded

    def process_weights_after_loading(self) -> None:
        """Say what quantised weights take on a CPU; called when every layer has done its part."""
        if line := describe(self, self.model_dtype):
            logger.info(line)
