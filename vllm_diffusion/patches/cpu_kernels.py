"""Which Triton kernels of Model Runner V2 get a stand-in on a Triton-free CPU host.

The list is what a diffusion model can reach there: plain steps, chunked prefill, images, prefix
caching, preemption, pipeline ranks, log-probabilities, grammars, caches of mixed precision. Kernels
of samplers and speculators it never calls are left alone; launching one fails as in stock vLLM.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

_RUNNER = "vllm.v1.worker.gpu"


def stand_ins() -> dict[str, Callable[..., None]]:
    """Return the kernels, by the names `vllm.triton_utils.dispatcher` takes, and who stands in."""
    from vllm_diffusion.patches import cpu_request_kernels as request
    from vllm_diffusion.patches import cpu_step_kernels as step

    batch, logprob = f"{_RUNNER}.input_batch", f"{_RUNNER}.sample.logprob"
    return {
        f"{_RUNNER}.buffer_utils._apply_write_kernel": step.apply_staged_writes,
        f"{_RUNNER}.block_table._gather_block_tables_kernel": step.gather_block_tables,
        f"{_RUNNER}.block_table._compute_slot_mappings_kernel": step.compute_slot_mappings,
        f"{batch}._prepare_prefill_inputs_kernel": step.prepare_prefill_inputs,
        f"{batch}._prepare_pos_seq_lens_kernel": step.prepare_positions,
        f"{batch}._combine_sampled_and_draft_tokens_kernel": step.combine_sampled_and_draft_tokens,
        f"{batch}._expand_idx_mapping_kernel": step.expand_slots,
        f"{batch}._post_update_kernel": step.post_update,
        f"{batch}._post_update_num_computed_tokens_kernel": step.post_update_num_computed,
        f"{logprob}._topk_log_softmax_kernel": request.topk_log_softmax,
        f"{logprob}._ranks_kernel": request.ranks,
        f"{logprob}._fill_logprob_token_ids_kernel": request.fill_logprob_token_ids,
        f"{_RUNNER}.sample.prompt_logprob._prompt_logprobs_token_ids_kernel": (
            request.prompt_logprob_token_ids
        ),
        f"{_RUNNER}.structured_outputs._apply_grammar_bitmask_kernel": (
            request.apply_grammar_bitmask
        ),
        "vllm.v1.worker.utils._zero_kv_blocks_kernel": request.zero_kv_blocks,
    }


def install() -> None:
    """Replace the kernels, everywhere they are referenced. Imports Model Runner V2.

    Only for a worker process in which `vllm.v1.worker.cpu_worker` is already imported; see
    `cpu_worker.py` for why.
    """
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels(stand_ins())


def are_needed() -> bool:
    """Whether vLLM's CPU platform still brings no version of these kernels itself."""
    from vllm.platforms.cpu import CpuPlatform

    return f"{_RUNNER}." not in inspect.getsource(CpuPlatform.register_triton_kernel_overrides)


def complete_placeholder() -> None:
    """Give vLLM's stand-in for the `triton` module the one function its callers miss."""
    from vllm.triton_utils import triton
    from vllm.utils.math_utils import next_power_of_2

    triton.next_power_of_2 = next_power_of_2


def placeholder_is_incomplete() -> bool:
    """Whether that stand-in still misses it."""
    from vllm.triton_utils.importing import TritonPlaceholder

    placeholder: Any = TritonPlaceholder()
    return not hasattr(placeholder, "next_power_of_2")
