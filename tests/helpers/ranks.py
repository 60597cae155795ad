"""The requests of the tensor-parallel tests, and a program that answers them on some ranks.

    python -m helpers.ranks CHECKPOINT RANKS [ADAPTER]

prints the tokens of every answer on a line of its own, a list of lists in JSON. Ranks live in
processes that start with what this one was started with, so they cannot be a test's own.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

OPTIONS: dict[str, Any] = {"max_model_len": 256}


def answers(llm: LLM, adapter: str = "") -> list[list[int]]:
    """Tokens of plain requests, with every wish, constrained; every second through the adapter."""
    prompts = ["hello world", "the quick brown fox jumps over the lazy dog"]
    common: dict[str, Any] = {"max_tokens": 64, "ignore_eos": True, "seed": 1}
    soft = {"diffusion_soft_embedding_top_k": 8}
    asked = [
        SamplingParams(**common),
        SamplingParams(**common),
        SamplingParams(**common, top_p=0.97),
        SamplingParams(**common, top_k=20, min_p=0.001, extra_args=soft),
        # The last one is too large for an automaton: a parser keeps it.
        *(
            SamplingParams(**common, structured_outputs=StructuredOutputsParams(**constraint))
            for constraint in ({"json_object": True}, {"regex": "(a|b)*a(a|b){14}"})
        ),
    ]
    request = LoRARequest("adapter", 1, adapter) if adapter else None
    outputs = llm.generate(prompts * 3, asked, lora_request=[None, request] * 3, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(checkpoint: str, ranks: str, adapter: str = "") -> None:
    """Start an engine and print its answers."""
    llm = LLM(
        checkpoint,
        tensor_parallel_size=int(ranks),
        dtype="float32",
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        enable_lora=bool(adapter),
        **OPTIONS,
    )
    print(json.dumps(answers(llm, adapter)))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
