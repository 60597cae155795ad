"""Output matrix and embedding of a model class, as a streaming head reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_diffusion.head.sample import TILE
from vllm_diffusion.head.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def rank_vocabulary(
    head: Any,
    table: Any,
    processor: Any,
    *,
    softcap: float | None = None,
    scale: Tensor | float = 1.0,
    loads: Callable[[], int],
) -> Vocabulary | None:
    """This rank's part of the vocabulary for a head that streams over it.

    None where only the layers can multiply with it (a quantised head, one of another precision) or
    where ranks cut tiles of the sampling definition, see ``head.sample``: 262144 ids over a power
    of two of ranks do not.

    Args:
        head: vLLM's ``ParallelLMHead``.
        table: its ``VocabParallelEmbedding``.
        processor: its ``LogitsProcessor``.
        softcap: see ``Vocabulary``.
        scale: see ``Vocabulary``.
        loads: see ``Vocabulary``.
    """
    plain = isinstance(head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
    shard = table.shard_indices
    first, end = shard.org_vocab_start_index, shard.org_vocab_end_index
    size = processor.org_vocab_size
    whole_tiles = first % TILE == 0 and (end % TILE == 0 or end == size)
    if not plain or processor.head_dtype not in {None, head.weight.dtype}:
        return None
    ranks = get_tensor_model_parallel_world_size()
    if not whole_tiles or (ranks > 1 and size % (TILE * ranks)):
        return None
    return Vocabulary(
        output=head.weight[: end - first],
        embedding=table.weight[: end - first],
        first=first,
        size=size,
        softcap=softcap,
        scale=scale,
        gather=lambda values: tensor_model_parallel_all_gather(values[None], dim=0),
        add=tensor_model_parallel_all_reduce,
        loads=loads,
    )
