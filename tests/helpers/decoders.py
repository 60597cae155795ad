"""A model class of ours outside an engine: loaded from a checkpoint, run under a dense mask.

Its attention layers are replaced by the definition of attention, so weights, names, norms, rotary
embedding, experts and head are vLLM's, and which row sees which is the test's.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@contextmanager
def loaded_decoder(checkpoint: Path, folder: Path, **options: Any) -> Iterator[DenseDecoder]:
    """The checkpoint's model in this process.

    Args:
        checkpoint: what to load.
        folder: for a file by which a process group is made.
        options: of ``EngineArgs``.
    """
    from vllm.config import set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
        model_parallel_is_initialized,
    )
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import (
        initialize_model,
        process_weights_after_loading,
    )
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = decoder_config(checkpoint, **options)
    # An engine of another test may live in this process, and its groups are alike.
    alone = not model_parallel_is_initialized()
    with set_current_vllm_config(config):
        if alone:
            init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
            initialize_model_parallel(1, 1)
        try:
            with set_default_torch_dtype(config.model_config.dtype):
                model = initialize_model(vllm_config=config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
            process_weights_after_loading(model, config.model_config, torch.device("cpu"))
            yield DenseDecoder(model, config)
        finally:
            if alone:
                destroy_model_parallel()
                destroy_distributed_environment()


def decoder_config(checkpoint: Path, **options: Any) -> Any:
    """vLLM's config for a checkpoint, with what the family settles and nothing of the engine's."""
    import pytest
    from vllm.engine.arg_utils import EngineArgs

    from vllm_diffusion.engine.serving import CanvasServing
    from vllm_diffusion.models import family_module

    def settle(vllm_config: Any) -> None:
        family_module(vllm_config.model_config.architecture).settle(vllm_config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CanvasServing, "verify_and_update_config", staticmethod(settle))
        defaults = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32"}
        return EngineArgs(str(checkpoint), **(defaults | options)).create_engine_config()


class DenseDecoder:
    """A loaded model and the mask that its attention layers ask for."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model = model
        self._config = config
        self._seen = torch.ones(1, 1, dtype=torch.bool)
        for layer in model.model.layers:
            layer.self_attn.attn = _DenseAttention(layer.self_attn, self)

    def logits(self, tokens: Sequence[int], seen: Tensor) -> Tensor:
        """[T, V] fp32 logits of every position; `seen` [T, T] bool: which columns a row sees."""
        from vllm.forward_context import set_forward_context

        self._seen = seen
        with (
            torch.inference_mode(),
            set_forward_context(None, self._config, num_tokens=len(tokens)),
        ):
            hidden = self.model(torch.tensor(tokens), torch.arange(len(tokens)))
            return self.model.logits(hidden).clone()

    @property
    def seen(self) -> Tensor:
        return self._seen


class _DenseAttention(nn.Module):
    """softmax(q k / sqrt(d)) v under the owner's mask."""

    def __init__(self, owner: Any, decoder: DenseDecoder) -> None:
        super().__init__()
        self._heads, self._kv_heads = owner.num_heads, owner.num_kv_heads
        self._scale = owner.scaling
        self._decoder = [decoder]  # in a list, or it would count as a part of the model

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        shared = self._heads // self._kv_heads
        q = query.view(len(query), self._heads, -1).transpose(0, 1)
        k, v = (
            part.view(len(part), self._kv_heads, -1).transpose(0, 1).repeat_interleave(shared, 0)
            for part in (key, value)
        )
        scores = (q @ k.transpose(1, 2) * self._scale).masked_fill(
            ~self._decoder[0].seen, -torch.inf
        )
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def assert_same_logits(ours: Tensor, truth: Any, tokens: Sequence[int], seen: Tensor) -> None:
    """Ours are Transformers', far nearer than another mask would come.

    Args:
        ours: [T, V] fp32.
        truth: its model, in fp32.
        tokens: T ids.
        seen: [T, T] bool, which columns a row sees.
    """
    from vllm_diffusion.testing.dense_reveal import dense_logits

    expected = dense_logits(truth, tokens, seen)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    causal = dense_logits(truth, tokens, seen.tril())
    assert torch.equal(seen, seen.tril()) or float((causal - expected).abs().max()) > 1.0
